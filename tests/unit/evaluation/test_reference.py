"""References: built once, shared as a file, refused where unlike would be compared with like; the
usual .npz.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpl_pretrain.cli import reference as command
from lpl_pretrain.config.load import dump
from lpl_pretrain.errors import ConfigError, DataError
from lpl_pretrain.evaluation import evaluator, registry
from lpl_pretrain.evaluation.build_reference import evenly_spaced
from lpl_pretrain.evaluation.fid import frechet_distance
from lpl_pretrain.evaluation.reference import check_provenance, read_npz, read_reference
from lpl_pretrain.evaluation.stats import FeatureStatistics
from tests.support.tiny_run import color_means_extractor

CPU = torch.device("cpu")
ALL = ["fd", "kid", "precision_recall"]


@pytest.fixture(autouse=True)
def small_extractor(monkeypatch):
    for module in (evaluator, registry):
        monkeypatch.setattr(module, "load_extractor", color_means_extractor)


def evaluate(run, **changes):
    return list(
        evaluator.evaluate(
            run.run_dir, run.protocol(metrics=ALL, kid_subsets=2, **changes), CPU, [6]
        )
    )[0]


def make_file(run, path, **changes):
    protocol = path.with_suffix(".yaml")
    protocol.write_text(dump(run.protocol(metrics=ALL, **changes)))
    command.run(str(protocol), str(path), [], 32)
    return path


def scores(record):
    return [entry["value"] for entry in record["results"]]


def test_a_file_gives_the_same_scores_as_its_images(run, tmp_path, capsys):
    path = make_file(run, tmp_path / "real.safetensors")
    assert "12 pictures at 32 px, by efficientnet_lite0" in capsys.readouterr().out
    assert scores(evaluate(run, name="a")) == scores(
        record := evaluate(run, name="b", reference=str(path))
    )
    assert record["reference"]["pictures"] == 12 and record["reference"]["file"] == str(path)
    with pytest.raises(ConfigError, match="wanted a new file whose name ends in .safetensors"):
        make_file(run, path)


def test_unlike_provenance_is_refused(run, tmp_path, monkeypatch):
    path = make_file(run, tmp_path / "real.safetensors")
    found, protocol = read_reference(path), run.protocol(metrics=ALL)
    (mine,) = (color_means_extractor(entry, CPU) for entry in protocol.extractors)
    check_provenance("x", found, protocol, 32, [mine])
    for change, resolution_px, words in (
        ({}, 64, "is of images of 32 px, the run generates 64 px"),
        ({"weights_sha256": "1" * 64}, 32, "made by another efficientnet_lite0: weights_sha256"),
        ({"preprocessing": "another"}, 32, "preprocessing 'none' there, 'another' here"),
        ({"config": mine.config.model_copy(update={"name": "other"})}, 32, "no features by other"),
    ):
        other = type(mine)(**{**vars(mine), **change})
        with pytest.raises(ConfigError, match=words):
            check_provenance("x", found, protocol, resolution_px, [other])
    means = make_file(run, tmp_path / "means.safetensors", name="means")
    bare = read_reference(means)
    bare.features.clear()
    with pytest.raises(ConfigError, match="has no features of single images"):
        check_provenance("x", bare, protocol, 32, [mine])


def test_a_file_that_is_no_reference_is_named(run, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"x\.safetensors: no statistics"):
        evaluate(run, reference=str(tmp_path / "x.safetensors"))


def test_the_usual_npz(run, tmp_path):
    """The distance to it is that to the statistics it was written from, whatever their number of
    images.
    """
    generator = torch.Generator().manual_seed(0)
    real, made = FeatureStatistics(12), FeatureStatistics(12)
    real.update(torch.randn(100, 12, generator=generator))
    made.update(torch.randn(40, 12, generator=generator) + 0.3)
    np.savez(tmp_path / "real.npz", mu=real.mean.numpy(), sigma=real.covariance.numpy())
    protocol = run.protocol(extractors=[{"kind": "inception", "weights": "x"}])
    extractor = color_means_extractor(protocol.extractors[0], CPU)
    found = read_npz(tmp_path / "real.npz", protocol, [extractor]).statistics["inception/pooled"]
    assert frechet_distance(made, found) == pytest.approx(frechet_distance(made, real), rel=1e-9)
    with pytest.raises(ConfigError, match="use metrics=.fd. and one extractor of kind inception"):
        read_npz(
            tmp_path / "real.npz",
            run.protocol(),
            [color_means_extractor(run.protocol().extractors[0], CPU)],
        )
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    with pytest.raises(ConfigError, match=r"mu \(3,\), sigma \(3, 3\); wanted D = 12"):
        read_npz(tmp_path / "bad.npz", protocol, [extractor])
    np.savez(tmp_path / "worse.npz", mean=np.zeros(3))
    with pytest.raises(ConfigError, match="wanted mu"):
        read_npz(tmp_path / "worse.npz", protocol, [extractor])


def test_evenly_spaced():
    assert evenly_spaced(10, 5) == [0, 2, 4, 6, 8] and evenly_spaced(3, 5) == [0, 1, 2]
