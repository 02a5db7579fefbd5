"""A protocol over a run's checkpoints: what is scored, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from lpl_pretrain.checkpoint.weights import reconstruct_ema
from lpl_pretrain.cli import evaluate as evaluate_command
from lpl_pretrain.cli import sample as sample_command
from lpl_pretrain.config.load import dump
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import CheckpointError, ConfigError, DataError
from lpl_pretrain.evaluation import evaluator
from lpl_pretrain.evaluation.trained_run import load_weights, open_run
from lpl_pretrain.runtime.lease import Lease
from tests.support.configs import train_config
from tests.support.tiny_run import color_means_extractor, make_run, save_snapshot

CPU = torch.device("cpu")


def evaluate(run_dir, protocol, steps=None):
    return list(evaluator.evaluate(run_dir, protocol, CPU, steps))


@pytest.fixture(autouse=True)
def small_extractor(request, monkeypatch):
    if "real_extractor" not in request.fixturenames:
        monkeypatch.setattr(evaluator, "load_extractor", color_means_extractor)


@pytest.fixture
def real_extractor():
    """Asks for EfficientNet-Lite0."""


def test_scores_what_is_complete_and_not_yet_scored(run):
    records = evaluate(run.run_dir, run.protocol())
    assert [record["step"] for record in records] == [3, 6]  # not 9, which has no manifest
    assert evaluate(run.run_dir, run.protocol()) == []
    run.run_dir.evaluation(3, "tiny").unlink()
    assert [record["step"] for record in evaluate(run.run_dir, run.protocol())] == [3]
    assert [record["step"] for record in evaluate(run.run_dir, run.protocol(), [6])] == [
        6
    ]  # asked for by name: again


def test_a_record_holds_what_repeating_it_needs(run):
    (record,) = evaluate(run.run_dir, run.protocol(), [6])
    assert json.loads(run.run_dir.evaluation(6, "tiny").read_text()) == record
    plain, guided = record["results"]
    assert (plain["guidance_scale"], guided["guidance_scale"]) == (1.0, 3.0)
    assert (plain["metric"], plain["images"]) == ("fd_averages", 10)
    assert plain["value"] > 0 and plain["value"] != guided["value"]
    assert (
        record["protocol"] == run.protocol().model_dump(mode="json") and plain["weights"] == "ema"
    )
    assert record["reference"]["pictures"] == 12 and len(record["reference"]["fingerprint"]) == 64
    assert (
        len(record["checkpoint_manifest_sha256"]) == 64
        and record["extractors"]["efficientnet_lite0"]["dimension"] == 12
    )
    assert "uint8" in record["rules"]
    for name in (record["samples"], f"evaluations/{record['reference']['grid']}"):
        with Image.open(run.run_dir.path / name) as grid:
            assert (
                grid.size[0] == 3 * 32 + 2 * 2 and grid.size[1] == 2 * 32 + 2
            )  # five images: three columns
    assert not list(run.run_dir.path.rglob("*.tmp"))


def test_repeats_to_the_digit_and_weights_matter(run):
    values = {}
    for name, changes in {
        "a": {},
        "b": {},
        "raw": {"weights": ["raw"]},
        "seed": {"seed": 1},
        "batch": {"batch_size": 3},
    }.items():
        (record,) = evaluate(run.run_dir, run.protocol(name=name, **changes), [6])
        values[name] = record["results"][0]["value"]
    assert values["a"] == values["b"] and values["a"] not in (values["raw"], values["seed"])
    assert values["batch"] == pytest.approx(
        values["a"], rel=1e-2
    )  # a pixel may round to its neighbour


@pytest.mark.parametrize("broken", [False, True])
def test_error_bars_by_repeated_seeds(run, broken, monkeypatch):
    """Each set of images is that of its own seed, the images shown are the first; teeth: one
    seed for all.
    """
    wanted = [
        [
            entry["value"]
            for entry in evaluate(run.run_dir, run.protocol(name=f"s{i}", seed=i), [6])[0][
                "results"
            ]
        ]
        for i in (4, 5, 6)
    ]
    if broken:
        generate = evaluator.Evaluator._generate
        monkeypatch.setattr(
            evaluator.Evaluator,
            "_generate",
            lambda self, store, seed, *rest: generate(self, store, 4, *rest),
        )
    (record,) = evaluate(run.run_dir, run.protocol(name="all", seed=4, repeats=3), [6])
    assert (
        [entry["values"] for entry in record["results"]]
        == [list(of_one) for of_one in zip(*wanted, strict=True)]
    ) is not broken
    for entry in record["results"]:
        assert entry["value"] == pytest.approx(np.mean(entry["values"])) and entry["images"] == 10
        assert (
            entry["std"] == pytest.approx(np.std(entry["values"], ddof=1))
            and (entry["std"] > 0) is not broken
        )
        assert entry["images_made_now"] == 30
    shown, first = (run.run_dir.samples(6, name).read_bytes() for name in ("all", "s4"))
    assert shown == first


@pytest.mark.parametrize("kind", ["png", "npz", "tar"])
def test_generated_images_are_saved_on_request(run, kind):
    """The very pixels that were scored, beside the sheet, in order."""
    evaluate(run.run_dir, run.protocol(keep_images=kind, guidance_scales=[3.0], grid_images=0), [6])
    generator = open_run(run.run_dir, CPU)
    generator.load(6, "ema")
    way = {"sampler": run.protocol().sampler, "guidance_scale": 3.0, "seed": 0}
    batches = [
        generator.generator.pixels(batch, **way) for batch in (range(4), range(4, 8), range(8, 10))
    ]
    wanted = torch.cat(batches).permute(0, 2, 3, 1).numpy()
    stem = run.run_dir.path / "samples" / "step_00000006_tiny_ema_w3"
    if kind == "npz":
        with np.load(stem.with_suffix(".npz")) as file:
            found = file["arr_0"]
    elif kind == "png":
        found = np.stack([np.asarray(Image.open(path)) for path in sorted(stem.iterdir())])
    else:
        samples = webdataset.WebDataset(str(stem.with_suffix(".tar")), shardshuffle=False).decode(
            "rgb8"
        )
        found = np.stack([sample["png"] for sample in samples])
    assert np.array_equal(found, wanted)


def test_an_average_of_any_length_is_rebuilt_and_scored(tmp_path):
    run = make_run(tmp_path, "flow", "rectified_flow", ema__sigma_rel=(0.05, 0.1))
    for step in (3, 6):
        save_snapshot(run.run_dir, step)
    trained = open_run(run.run_dir, CPU)
    trained.load(6, "posthoc_0.080")
    tensors, _ = reconstruct_ema(run.run_dir, (0.05, 0.1), 0.08, 6)
    state = trained.generator.denoiser.state_dict()
    assert tensors and all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    (record,) = evaluate(
        run.run_dir, run.protocol(weights=["ema", "posthoc_0.080"], guidance_scales=[1.0]), [6]
    )
    ema, rebuilt = record["results"]
    assert (ema["weights"], rebuilt["weights"]) == ("ema", "posthoc_0.080") and ema[
        "value"
    ] != rebuilt["value"]
    with pytest.raises(CheckpointError, match="no snapshot of step 5"):
        load_weights(trained.generator.denoiser, run.run_dir, trained.config, 5, "posthoc_0.080")


def test_reference_is_read_once_and_again_when_it_changes(run, monkeypatch):
    evaluate(run.run_dir, run.protocol(), [3])
    with monkeypatch.context() as patch:
        patch.setattr(
            "lpl_pretrain.encoding.source_image.SourceImage.load",
            lambda picture: pytest.fail("read again"),
        )
        evaluate(run.run_dir, run.protocol(), [6])
    shutil.copy(run.reference / "00.png", run.reference / "zz.png")
    (record,) = evaluate(run.run_dir, run.protocol(), [6])
    assert record["reference"]["pictures"] == 13


def test_another_protocol_of_the_same_name_is_refused(run):
    evaluate(run.run_dir, run.protocol(), [3])
    with pytest.raises(ConfigError, match="images: scored with 10, now 12"):
        evaluate(run.run_dir, run.protocol(images=12))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampler": {"kind": "ddim"}}, "sampler.kind=ddim"),
        ({"images": 1}, "images=1"),
        ({"guidance_scales": []}, "guidance_scales"),
        ({"name": "a b"}, "file name"),
        (
            {"extractors": [{"kind": "inception"}]},
            "extractors.inception.weights=null.*pt_inception",
        ),
        ({"extractors": [{"kind": "timm"}]}, "kind=timm needs network"),
        (
            {"extractors": [{"kind": "timm", "network": "resnet18", "weights": "/x.pth"}]},
            "no such file",
        ),
        (
            {"extractors": [{"kind": "clip", "weights": "/nowhere"}], "metrics": ["cmmd"]},
            "no such folder",
        ),
        ({"extractors": [{"kind": "efficientnet_lite0"}] * 2}, "two are called efficientnet_lite0"),
        (
            {"metrics": ["fd", "inception_score"]},
            "inception_score wants an extractor of kind inception",
        ),
        ({"metrics": ["fd", "fd"]}, "one is named twice"),
        ({"bootstrap": 5, "repeats": 3}, "two error bars for one score"),
        (
            {"on_too_few_images": "refuse"},
            "images=10 for the 12 features.*on_too_few_images=refuse",
        ),
    ],
)
def test_protocols_that_cannot_run(run, changes, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(run.run_dir, run.protocol(**changes))


def test_checkpoints_that_are_not_there(run):
    with pytest.raises(CheckpointError, match="complete steps: 3, 6"):
        evaluate(run.run_dir, run.protocol(), [9])
    shutil.rmtree(run.run_dir.checkpoints)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        evaluate(run.run_dir, run.protocol())


def test_a_corrupt_reference_image_is_named(run):
    (run.reference / "05.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"05\.png"):
        evaluate(run.run_dir, run.protocol())
    assert not list(run.run_dir.path.glob("evaluations/*.safetensors")) and not list(
        run.run_dir.path.glob("evaluations/step*")
    )


@pytest.mark.parametrize("prediction, schedule", [("eps", "linear"), ("v", "cosine")])
def test_other_objectives(run_of, prediction, schedule):
    made = run_of(prediction, schedule)
    (record,) = evaluate(made.run_dir, made.protocol(sampler={"kind": "ddim", "steps": 3}), [6])
    assert record["results"][0]["value"] > 0


def test_command_line(run, tmp_path, capsys, real_extractor):
    path = tmp_path / "protocol.yaml"
    path.write_text(dump(run.protocol()))
    evaluate_command.run(str(run.run_dir.path), str(path), ["images=4"], 6)
    evaluate_command.run(str(run.run_dir.path), str(path), ["images=4"], 6)
    said = capsys.readouterr()
    assert (
        "fd_efficientnet_lite0, 4 pictures" in said.out
        and "ema w=3" in said.out
        and "biased upwards" in said.err
    )


def test_sample_writes_a_grid(run, capsys):
    draw(run, guidance_scale=2.0, images=3, sampler={"steps": 2})
    path = capsys.readouterr().out.strip()
    assert "step_00000006" in path and Image.open(path).size == (66, 66)
    output = run.run_dir.path / "x" / "y.png"
    draw(run, step=3, images=1, sampler={"steps": 1}, output=str(output))
    assert output.is_file()


def draw(run, **options):
    defaults = {
        "step": None,
        "guidance_scale": 1.0,
        "images": 2,
        "sampler": {"steps": 2},
        "guide": None,
        "guide_step": None,
    }
    defaults |= {"prompts": (), "text_encoders": ()}
    sample_command.run(
        str(run.run_dir.path),
        **{**defaults, "seed": 0, "format": "grid", "output": None, **options},
    )


def test_saved_images_carry_their_metadata(run, tmp_path):
    """Single files and a tar that webdataset reads hold the same pixels; the sheet shows them."""
    draw(run, format="png", output=str(tmp_path / "pngs"))
    draw(run, format="tar", output=str(tmp_path / "some.tar"))
    draw(run, format="tar", output=str(tmp_path / "again.tar"))
    assert (tmp_path / "some.tar").read_bytes() == (tmp_path / "again.tar").read_bytes()
    samples = list(
        webdataset.WebDataset(str(tmp_path / "some.tar"), shardshuffle=False).decode("pil")
    )
    assert [sample["__key__"] for sample in samples] == ["00000000", "00000001"]
    for i, sample in enumerate(samples):
        single = Image.open(tmp_path / "pngs" / f"{i:08d}.png")
        metadata = json.loads(single.text["lpl_pretrain"])
        assert metadata == sample["json"] and (
            metadata["step"],
            metadata["seed"],
            metadata["index"],
        ) == (6, 0, i)
        assert metadata["class"] in ("a", "b") and metadata["sampler"] == "euler"
        assert single.tobytes() == sample["png"].tobytes()


def test_a_protocol_may_name_a_guide(run):
    """Guided by its own weights a run scores as it does alone; the guide is part of the record."""
    me = {"run": str(run.run_dir.path), "step": 6}
    (alone,) = evaluate(run.run_dir, run.protocol(guidance_scales=[1.0]), [6])
    (itself,) = evaluate(
        run.run_dir, run.protocol(name="guided", guidance_scales=[3.0], guide=me), [6]
    )
    assert itself["results"][0]["value"] == pytest.approx(alone["results"][0]["value"], rel=1e-6)
    assert itself["protocol"]["guide"] == {**me, "weights": "ema"}


def test_a_guide_moves_the_samples_and_must_fit(run, tmp_path):
    """Guided by itself at any scale a model draws what it draws alone; by an earlier step,
    something else.
    """
    me = str(run.run_dir.path)

    def pixels(name, **options):
        draw(run, format="tar", output=str(tmp_path / name), **options)
        return [
            sample["png"].tobytes()
            for sample in webdataset.WebDataset(str(tmp_path / name), shardshuffle=False).decode(
                "pil"
            )
        ]

    alone = pixels("alone.tar")
    assert pixels("itself.tar", guidance_scale=3.0, guide=me, guide_step=6) == alone
    assert pixels("younger.tar", guidance_scale=3.0, guide=me, guide_step=3) != alone
    with pytest.raises(CheckpointError, match="complete steps: 3, 6"):
        draw(run, guide=me, guide_step=4)
    config = train_config(diffusion__prediction="v", diffusion__schedule="cosine")
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    other.config.write_text(dump(config))
    with pytest.raises(
        ConfigError,
        match="guide.run=.*other: trained with diffusion.prediction=.*v, this run with .*flow",
    ):
        draw(run, guide=str(other.path))


def test_one_that_is_asked_to_stop_keeps_what_it_made(run):
    """One batch is generated before the stop, and the other images after it."""
    asked = iter([False, True])
    protocol = run.protocol(batch_size=4, name="stopped")
    assert (
        list(
            evaluator.evaluate(run.run_dir, protocol, CPU, [6], stopping=lambda: next(asked, True))
        )
        == []
    )
    assert not run.run_dir.evaluation(6, "stopped").exists() and not run.run_dir.evaluation_leases()
    assert len(list(run.run_dir.path.glob("evaluations/*/stopped.*.partial/*/*.safetensors"))) == 1
    (record,) = evaluator.evaluate(run.run_dir, protocol, CPU, [6])
    assert [entry["images_made_now"] for entry in record["results"]] == [6, 10]


def test_what_a_killed_evaluator_left_of_a_scored_step_is_removed(run):
    protocol = run.protocol(name="killed", images=4)
    list(evaluator.evaluate(run.run_dir, protocol, CPU, [3]))
    folder = run.run_dir.evaluation(3, "killed").parent
    scored = run.run_dir.evaluation(3, "killed").read_bytes()
    ended = subprocess.Popen(["true"])
    ended.wait()
    holder = {
        "token": "of the killed",
        "job": "",
        "host": socket.gethostname(),
        "pid": ended.pid,
        "since": 0.0,
    }
    run.run_dir.evaluation_lease(3, "killed").write_text(json.dumps(holder))
    (folder / "killed.0123456789ab.partial" / "ema_w1_seed0").mkdir(parents=True)
    others = [folder / f"{protocol}.0123456789ab.partial" for protocol in ("another", "killed.too")]
    for other in others:
        other.mkdir()
    list(evaluator.evaluate(run.run_dir, protocol, CPU, [6]))
    assert not run.run_dir.evaluation_leases() and sorted(folder.glob("*.partial")) == others
    assert run.run_dir.evaluation(3, "killed").read_bytes() == scored

    with Lease(
        run.run_dir.evaluation_lease(3, "killed")
    ) as lease:  # an evaluator at work on it again
        (folder / "killed.0123456789ab.partial").mkdir()
        list(evaluator.evaluate(run.run_dir, protocol, CPU, [6]))
        assert lease.held and list(folder.glob("killed.*.partial"))


@pytest.mark.parametrize("left", ["nothing", "an older one"])
def test_the_best_checkpoint_follows_the_records_where_an_evaluator_ended_between_the_two(
    run, left
):
    protocol = run.protocol(
        name="between", images=4, metrics=["kid"], kid_subset_size=4, best="kid_averages"
    )
    list(evaluator.evaluate(run.run_dir, protocol, CPU))
    path = run.run_dir.best("between")
    whole, best = path.read_bytes(), json.loads(path.read_text())
    assert list(evaluator.evaluate(run.run_dir, protocol, CPU)) == [] and path.read_bytes() == whole
    path.unlink()
    if left == "an older one":
        (other,) = {3, 6} - {best["step"]}
        entry = json.loads(run.run_dir.evaluation(other, "between").read_text())["results"][0]
        path.write_text(
            json.dumps({"step": other, **{key: entry[key] for key in best.keys() - {"step"}}})
        )
    assert list(evaluator.evaluate(run.run_dir, protocol, CPU)) == [] and path.read_bytes() == whole
