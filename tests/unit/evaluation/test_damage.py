"""Files that evaluation meets and that are damaged, gone, or not what their names say: named, and
never a traceback.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lpl_pretrain.cli import evaluate as evaluate_command
from lpl_pretrain.cli import export as export_command
from lpl_pretrain.cli import reference as reference_command
from lpl_pretrain.cli import sample as sample_command
from lpl_pretrain.config.load import dump
from lpl_pretrain.config.protocol import ExtractorConfig
from lpl_pretrain.errors import CheckpointError, ConfigError, DataError
from lpl_pretrain.evaluation import evaluator, registry, trained_run
from lpl_pretrain.evaluation.checksummed_tensors import load_tensors, save_tensors
from lpl_pretrain.evaluation.feature_store import FeatureStore
from lpl_pretrain.evaluation.inception import load_inception, random_weights
from lpl_pretrain.evaluation.reference import read_npz, read_reference
from lpl_pretrain.evaluation.timm_networks import load_timm_network
from lpl_pretrain.runtime.lease import Lease
from lpl_pretrain.runtime.log import log
from tests.support.checkpoints import edit
from tests.support.tiny_run import color_means_extractor

CPU = torch.device("cpu")
SMALL = {
    "images": 4,
    "sampler": {"kind": "euler", "steps": 1},
    "guidance_scales": [1.0],
    "grid_images": 0,
}


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """A small extractor, and a log that caplog hears whatever a command in this process has set up
    before.
    """
    for module in (evaluator, registry):
        monkeypatch.setattr(module, "load_extractor", color_means_extractor)
    monkeypatch.setattr(log, "propagate", True)


def protocol_of(run, **changes):
    return run.protocol(**{**SMALL, **changes})


def steps_of(records) -> list[int]:
    return [record["step"] for record in records]


def evaluate(run, steps=None, passed_over=None, **changes):
    return list(
        evaluator.evaluate(
            run.run_dir, protocol_of(run, **changes), CPU, steps, passed_over=passed_over
        )
    )


def spoil(folder: Path) -> None:
    edit(folder, "manifest.json", lambda content: content.update(optimizer_steps=-1))


def test_a_damaged_checkpoint_is_named_and_the_others_are_scored(run, caplog):
    spoil(run.run_dir.checkpoint(3))
    passed_over: dict[int, str] = {}
    assert steps_of(evaluate(run, passed_over=passed_over)) == [6]
    assert "optimizer_steps: found -1" in passed_over[3] and "step 3 is not scored: " in caplog.text
    with pytest.raises(
        CheckpointError, match="step_00000003/manifest.json: optimizer_steps: found -1"
    ):
        evaluate(run, [3])


def test_the_command_ends_though_one_is_damaged(run, tmp_path, capsys):
    """Watching too: a damaged checkpoint is tried once.  Nothing but damage is an error."""
    spoil(run.run_dir.checkpoint(3))
    path = tmp_path / "protocol.yaml"
    path.write_text(dump(protocol_of(run)))
    evaluate_command.run(str(run.run_dir.path), str(path), [], None, watch=True, poll_s=0.01)
    said = capsys.readouterr().out
    assert "not scored: " in said and "step_00000003" in said and "fd_averages, 4 pictures" in said
    with pytest.raises(CheckpointError, match="nothing was scored:\n.*step_00000003"):
        evaluate_command.run(str(run.run_dir.path), str(path), [], None)


def test_a_checkpoint_that_cannot_be_read_now_may_be_scored_by_another_try(
    run, tmp_path, capsys, monkeypatch
):
    """The exit status is 1 for a scheduler; the other steps are scored."""
    path = tmp_path / "protocol.yaml"
    path.write_text(dump(protocol_of(run)))
    real = evaluator.Evaluator._manifest

    def refused(self, step):
        if step == 3:
            raise CheckpointError(f"{self.run.run_dir.checkpoint(step)}: Input/output error")
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "_manifest", refused)
        with pytest.raises(SystemExit) as ended:
            evaluate_command.run(str(run.run_dir.path), str(path), [], None)
    assert ended.value.code == 1 and "Input/output error" in capsys.readouterr().out
    evaluate_command.run(str(run.run_dir.path), str(path), [], None)
    assert run.run_dir.pending_evaluations(protocol_of(run).name) == []


@pytest.mark.parametrize("when", ["with its lease", "with its weights"])
def test_a_checkpoint_may_be_removed_at_any_moment(run, caplog, monkeypatch, when):
    folder = run.run_dir.checkpoint(3)
    take, read_weights = Lease.take, trained_run.read_weights

    def vanish(real, *arguments):
        shutil.rmtree(folder, ignore_errors=True)
        return real(*arguments)

    if when == "with its lease":
        monkeypatch.setattr(Lease, "take", lambda *given: vanish(take, *given))
        words = "was removed before its evaluation began"
    else:
        monkeypatch.setattr(
            trained_run, "read_weights", lambda *given: vanish(read_weights, *given)
        )
        words = "was removed during its evaluation"
    assert steps_of(evaluate(run)) == [6]
    assert f"step_00000003: {words}" in caplog.text
    folder = run.run_dir.checkpoint(6)
    with pytest.raises(CheckpointError, match=f"step_00000006: {words}"):
        evaluate(run, [6])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ('{"format_version": 2', "is not valid JSON"),
        (
            '{"format_version": 2, "step": 6, "results": []}',
            "step: found 6, the folder is called step_00000003",
        ),
        (
            '{"format_version": 2, "step": 3, "protocol": {"name": "other"}}',
            "protocol.name: found 'other'",
        ),
    ],
)
def test_a_damaged_record_is_scored_again(run, caplog, content, words):
    (record, _) = evaluate(run)
    path = run.run_dir.evaluation(3, "tiny")
    path.write_text(content)
    assert run.run_dir.pending_evaluations("tiny") == [3]
    (again,) = evaluate(run)
    assert again["results"][0]["value"] == record["results"][0]["value"]
    assert f"{path}: {words}" in caplog.text and "is scored again" in caplog.text
    assert not run.run_dir.pending_evaluations("tiny")


def export(run, output, **options):
    defaults = {"weights": "ema", "step": None, "best": None, "sigma_rel": None, "format": "file"}
    export_command.run(str(run.run_dir.path), **{**defaults, **options}, output=str(output))
    with safe_open(output, framework="pt") as file:
        return file.metadata()


def test_a_damaged_best_file_is_replaced_from_the_records(run, tmp_path, caplog):
    """`export` reads the records instead; the next evaluation rewrites the file."""
    records = evaluate(run, best="fd_averages")
    best = min(records, key=lambda record: record["results"][0]["value"])["step"]
    path = run.run_dir.best("tiny")
    sound = path.read_text()
    for damaged in ("", json.dumps({**json.loads(sound), "step": 9 - best})):
        path.write_text(damaged)
        assert export(run, tmp_path / "best.safetensors", best="tiny")["step"] == str(best)
        assert f"{path}: " in caplog.text and f"the records say step {best}" in caplog.text
    assert evaluate(run, best="fd_averages") == [] and path.read_text() == sound
    path.write_text("{")
    for step in (3, 6):
        run.run_dir.evaluation(step, "tiny").unlink()
    with pytest.raises(DataError, match="--best=tiny: .*best_tiny.json is damaged"):
        export(run, tmp_path / "best.safetensors", best="tiny")


def test_export_and_sample_fall_back_and_refuse_alike(run, tmp_path, caplog):
    spoil(run.run_dir.checkpoint(6))
    assert export(run, tmp_path / "ema.safetensors")["step"] == "3"
    options = {
        "guidance_scale": 1.0,
        "images": 1,
        "sampler": {"steps": 1},
        "guide": None,
        "guide_step": None,
        "prompts": (),
    }
    options |= {"text_encoders": (), "seed": 0, "format": "tar", "output": str(tmp_path / "x.tar")}
    sample_command.run(str(run.run_dir.path), step=None, **options)
    assert (tmp_path / "x.tar").is_file() and caplog.text.count(
        "DAMAGED CHECKPOINT step_00000006: passed over"
    ) >= 2
    for command in (
        lambda: export(run, tmp_path / "y.safetensors", step=6),
        lambda: sample_command.run(str(run.run_dir.path), step=6, **options),
        lambda: sample_command.run(
            str(run.run_dir.path),
            step=3,
            **{**options, "guide": str(run.run_dir.path), "guide_step": 6},
        ),
    ):
        with pytest.raises(
            CheckpointError,
            match="step_00000006/manifest.json: .*: bring it back, or name another --step",
        ):
            command()


def test_another_runs_checkpoint_is_not_exported(run, tmp_path):
    edit(
        run.run_dir.checkpoint(6),
        "manifest.json",
        lambda content: content.update(identity="a" * 64),
    )
    with pytest.raises(CheckpointError, match="was saved by a run with another configuration"):
        export(run, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "posthoc_x"}, "--weights=posthoc_x: wanted ema, raw"),
        ({"weights": "optimizer.exp_avg"}, "--weights=optimizer.exp_avg: wanted ema, raw"),
        ({"weights": "posthoc_0.080"}, "no snapshot of step any"),
        ({"sigma_rel": float("nan")}, "sigma_rel=nan: wanted 0.01 to 0.28"),
    ],
)
def test_absent_weights_are_refused(run, tmp_path, options, words):
    with pytest.raises((ConfigError, CheckpointError), match=words):
        export(run, tmp_path / "x.safetensors", **options)


def test_where_export_cannot_write(run, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "x.safetensors"):
        with pytest.raises(ConfigError, match=f"--output={output}: "):
            export(run, output)


def test_where_reference_cannot_write(run, tmp_path):
    """Before the images are read."""
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text(dump(protocol_of(run)))
    with pytest.raises(ConfigError, match="cannot be written: .*protocol.yaml is no folder"):
        reference_command.run(str(protocol), str(protocol / "x.safetensors"), [], 32)


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_features_on_disk_are_not_believed(tmp_path):
    store = FeatureStore(tmp_path, 8, 4)
    for batch in store.batches:
        store.put(batch, {"x": torch.randn(4, 3), "y": torch.randn(4, 2)})
    path = tmp_path / "pictures_00000004.safetensors"
    flip(path)
    with pytest.raises(
        DataError, match="pictures_00000004.safetensors: .*sha256.*remove this file"
    ):
        store.read_all("y"), store.read_all("x")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(
        DataError, match="pictures_00000004.safetensors: cannot be read.*remove this file"
    ):
        store.read_all("x")
    path.unlink()
    with pytest.raises(DataError, match="pictures_00000004.safetensors: cannot be read"):
        store.read_all("x")


def test_tensors_are_those_that_were_saved(tmp_path):
    """One that was added or taken away, too; files of before, without digests, are read."""
    path, tensors = tmp_path / "x.safetensors", {"a": torch.arange(3), "b": torch.zeros(2, 2)}
    save_tensors(path, tensors, {"facts": "{}"})
    found, metadata = load_tensors(path)
    assert metadata == {"facts": "{}"} and all(
        torch.equal(found[name], tensor) for name, tensor in tensors.items()
    )
    with safe_open(path, framework="pt") as file:
        digests = file.metadata()
    save_file({"a": tensors["a"]}, path, metadata=digests)
    with pytest.raises(DataError, match="its header has digests of other tensors than the file"):
        load_tensors(path)
    save_file({**tensors, "b": torch.zeros(4)}, path, metadata=digests)
    with pytest.raises(DataError, match="b has another sha256"):
        load_tensors(path)
    save_file(tensors, path)
    assert load_tensors(path)[0].keys() == tensors.keys()


def test_a_reference_that_is_damaged_is_named(run):
    evaluate(run, [6])
    (path,) = run.run_dir.path.glob("evaluations/reference_*.safetensors")
    sound, metadata = load_file(path), safe_open(path, framework="pt").metadata()
    label = "efficientnet_lite0/pooled"

    def refused(words, tensors=None, facts=None):
        changed = {
            **sound,
            **{f"{label}/{name}": tensor for name, tensor in (tensors or {}).items()},
        }
        save_file(changed, path, metadata={"facts": metadata["facts"] if facts is None else facts})
        with pytest.raises(
            DataError,
            match=f"{path.name}: no statistics.*{words}.*: remove it and write them again",
        ):
            read_reference(path)

    flip(path)
    with pytest.raises(DataError, match=f"{path.name}: no statistics.*sha256"):
        evaluate(run, [6])
    refused("finite numbers", {"mean": torch.full((12,), torch.nan, dtype=torch.float64)})
    refused("count 1: wanted 2", {"count": torch.tensor(1)})
    refused("scatter .12, 12., mean .13,.", {"mean": torch.zeros(13, dtype=torch.float64)})
    refused("mean torch.float32", {"mean": torch.zeros(12)})
    refused("is nested too deeply", facts="[" * 100_000)
    refused("wanted an object with extractors", facts="{}")
    refused(
        "pictures: found -1", facts=json.dumps({**json.loads(metadata["facts"]), "pictures": -1})
    )


def test_npz_files_that_are_none(run, tmp_path):
    protocol = run.protocol(extractors=[{"kind": "inception", "weights": "x"}])
    extractor = color_means_extractor(protocol.extractors[0], CPU)
    path = tmp_path / "x.npz"
    sound = {"mu": np.zeros(12), "sigma": np.eye(12)}
    np.savez(path, **sound)
    assert read_npz(path, protocol, [extractor]).statistics
    data = path.read_bytes()
    for damaged in (b"", b"PK\x03\x04 not at all", data[: len(data) // 2], b"\x80\x04."):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="x.npz: wanted mu"):
            read_npz(path, protocol, [extractor])
    np.save(tmp_path / "x.npy", np.zeros(12))
    (tmp_path / "x.npy").rename(path)
    with pytest.raises(ConfigError, match="x.npz: wanted mu"):
        read_npz(path, protocol, [extractor])
    for changes, words in (
        ({"mu": np.full(12, np.nan)}, "wanted finite mu and sigma"),
        ({"sigma": -np.eye(12)}, "no negative variance"),
        ({"sigma": np.triu(np.ones((12, 12)))}, "not symmetric"),
        ({"mu": np.array(["a"] * 12)}, "wanted mu"),
    ):
        np.savez(path, **{**sound, **changes})
        with pytest.raises(ConfigError, match=words):
            read_npz(path, protocol, [extractor])


def test_weights_files_that_are_damaged(tmp_path):
    """Weights of extractors; torch refuses a pickle that would run code, and it is named."""
    path = tmp_path / "x.pth"
    config = ExtractorConfig(kind="inception", weights=str(path))
    weights = random_weights()
    torch.save(weights, path)
    data = path.read_bytes()
    damaged: list[bytes] = [
        b"",
        b"PK\x03\x04",
        data[: len(data) // 2],
        b"cos\nsystem\n(S'exit 1'\ntR.",
        b"\x80\x02}q\x00.",
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="x.pth: not the FID Inception's weights"):
            load_inception(config, CPU)
    for value in ([1, 2], {"fc.weight": 1}, {**weights, "fc.weight": torch.zeros(3)}):
        torch.save(value, path)
        with pytest.raises(ConfigError, match="x.pth: not the FID Inception's weights"):
            load_inception(config, CPU)
    named = tmp_path / "x.safetensors"
    named.write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match="x.safetensors: not timm's resnet18"):
        load_timm_network(ExtractorConfig(kind="timm", network="resnet18", weights=str(named)), CPU)
    for source in ("hf-hub:a/b", "hf-hub:a"):
        with pytest.raises(ValidationError, match="network"):
            ExtractorConfig(kind="timm", network=source, weights=str(named))


def test_a_clip_that_lacks_a_tensor_is_refused(tmp_path):
    """transformers would draw it at random."""
    transformers = pytest.importorskip("transformers")
    from lpl_pretrain.evaluation.clip import load_clip

    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 8},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=4,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != "visual_projection.weight"},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        ConfigError, match="1 tensors are missing, such as visual_projection.weight"
    ):
        load_clip(ExtractorConfig(kind="clip", weights=str(tmp_path)), CPU)
