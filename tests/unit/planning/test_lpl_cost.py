"""The tool's figures: the published sizes, and each option saves what it says it saves."""

import json
from pathlib import Path

import pytest
import torch

from tools import lpl_cost

ROOT = Path(__file__).resolve().parents[3]


def costs(config, *arguments):
    found = lpl_cost.main([str(ROOT / "configs" / "train" / config), *arguments])
    return [{row[next(iter(row))]: row for row in found[kind]} for kind in ("stages", "options")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The demo's decoder with 16x16 latents, over two ranks with one microbatch each."""
    path = tmp_path_factory.mktemp("cost") / "cost.json"
    keys = ["lpl.activation_checkpointing=true", "lpl.stages=null", "lpl.decoder_precision=fp32"]
    found = costs(
        "emoji_dit_lpl.yaml",
        *keys,
        "--latent",
        "4,16,16",
        "--ranks",
        "2",
        "--json",
        str(path),
    )
    return *found, json.loads(path.read_text())


@pytest.mark.parametrize("side, decoder, denoiser", [(32, 622, 237.24), (64, 2515, 1049)])
def test_published_sizes(side, decoder, denoiser):
    """An SD decoder and DiT-XL/2 at 256 px (622 GFLOP; 118.6 GMAC as in arXiv 2212.09748) and at
    512 px.
    """
    config = lpl_cost.read_config(["batch.global_batch_size=64"], "xl2")
    case = lpl_cost.Case(config, config.lpl, (4, side, side), 1)
    rows = lpl_cost.stage_rows(lpl_cost.decoder_stages(lpl_cost.build_network("sd")), case)
    stages = {row["stage"]: row["forward GFLOP"] for row in rows}
    assert stages["all"] == pytest.approx(decoder, rel=0.01)
    assert case.denoiser_flops / 1e9 == pytest.approx(denoiser, rel=0.01)
    if side == 32:
        wanted = {"mid": 24, "up0": 48, "up1": 193, "up2": 217, "up3": 140}
        assert {name: round(stages[name]) for name in wanted} == wanted


def test_has_teeth_another_denoiser_is_another_size():
    config = lpl_cost.read_config([], "l2")
    assert lpl_cost.Case(config, config.lpl, (4, 32, 32), 1).denoiser_flops / 1e9 != pytest.approx(
        237.24, rel=0.1
    )


@pytest.mark.parametrize("name", ["flux", "flux2", "sana", "taesd"])
def test_named_shapes(name):
    decoder = lpl_cost.decoder_stages(lpl_cost.build_network(name))
    assert all(p.is_meta for p in decoder.parameters()) and list(decoder.stages)[:2] == [
        "mid",
        "up0",
    ]


def test_words():
    """A first word with `=` is an override; overrides win over `--denoiser`; one side takes the
    decoder's channels.
    """
    config = lpl_cost.read_config(["model.depth=3", "lpl.sample_fraction=0.5"], "s2")
    assert (config.name, config.model.width, config.model.depth) == ("dit_xl2_in256_lpl", 384, 3)
    assert config.lpl.sample_fraction == 0.5
    assert lpl_cost.latent_shape("8", 16, config) == (16, 8, 8) and lpl_cost.latent_shape(
        "16,8,4", 16, config
    ) == (16, 8, 4)
    with pytest.raises(lpl_cost.ConfigError, match="4 channels.*takes 16"):
        lpl_cost.latent_shape("4,8,8", 16, config)


def test_folder_and_file_are_the_same_decoder():
    folder = ROOT / "lpl_pretrain" / "assets" / "autoencoder_emoji"
    found = [lpl_cost.build_network(str(name)) for name in (folder, folder / "config.json")]
    assert found[0].config == found[1].config
    with pytest.raises(lpl_cost.ConfigError, match="not found; give --decoder"):
        lpl_cost.build_network(str(folder / "nothing"))


def test_a_sample_costs_its_four_passes(small):
    """Target, prediction, prediction again and input gradient, each counted by itself with plain
    autograd.
    """
    decoder = lpl_cost.decoder_stages(lpl_cost.build_network("asset:autoencoder_emoji"))
    features = lpl_cost.DecoderFeatures(
        decoder, lpl_cost.LatentScaling(*torch.ones(2, 4, device="meta"))
    )
    z0, seen = torch.empty(1, 4, 16, 16, device="meta", requires_grad=True), []
    forward = lpl_cost.count_flops(lambda: seen.append(sum(x.sum() for x in features(z0).values())))
    backward = lpl_cost.count_flops(lambda: torch.autograd.grad(seen[0], z0))
    assert small[1]["as configured"]["GFLOP a sample"] == pytest.approx(
        (3 * forward + backward) / 1e9
    )


def test_options_save_what_they_say(small):
    _, rows, _ = small
    base = rows["as configured"]
    assert base["samples a step"] == 10  # 9.4 of 32 are inside the gate, over two ranks
    without = rows["activation_checkpointing: false"]
    assert without["GFLOP a sample"] == pytest.approx(0.75 * base["GFLOP a sample"], rel=0.02)
    assert without["peak MiB"] > base["peak MiB"]
    cuts = [base, *(rows[f"stages up to {stage}"] for stage in ("up1", "up0", "mid"))]
    for whole, cut in zip(cuts, cuts[1:]):
        assert (
            cut["GFLOP a sample"] < whole["GFLOP a sample"]
            and cut["weights MiB"] < whole["weights MiB"]
        )
    assert rows["crop: {side: 8, halo: 4}"]["GFLOP a sample"] == pytest.approx(
        base["GFLOP a sample"], rel=0.01
    )  # a halo too wide
    half = rows["sample_fraction: 0.5"]
    assert half["samples a step"] == 6 and half["GFLOP a sample"] == base["GFLOP a sample"]
    assert half["of the denoiser's step"] == pytest.approx(0.6 * base["of the denoiser's step"])


def test_a_crop_that_fits_is_cheaper():
    _, rows = costs(
        "emoji_dit_lpl.yaml", "--latent", "4,32,32", "--decoder", "taesd", "lpl.stages=null"
    )
    assert rows["crop: {side: 16, halo: 4}"]["GFLOP a sample"] == pytest.approx(
        (24 / 32) ** 2 * rows["as configured"]["GFLOP a sample"]
    )


def test_json_holds_the_tables(small):
    stages, rows, saved = small
    assert saved == {"stages": list(stages.values()), "options": list(rows.values())}
    total = sum(row["forward GFLOP"] for name, row in stages.items() if name != "all")
    assert stages["all"]["forward GFLOP"] == pytest.approx(total)


def test_a_third_table_for_the_number_of_gated_samples():
    keys = ["lpl.stages=[mid]", "lpl.chunk_size=1", "lpl.decoder_precision=fp32"]
    found = lpl_cost.main(
        [
            str(ROOT / "configs/train/emoji_dit_lpl.yaml"),
            *keys,
            "--latent",
            "4,16,16",
            "--samples",
            "1,4",
        ]
    )
    one, four = (row["peak MiB"] for row in found["samples"])
    assert one < four < 1.1 * one
