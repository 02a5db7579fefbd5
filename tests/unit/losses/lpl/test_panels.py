"""Pictures of what LPL compared: they show it, and training does not notice them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lpl_pretrain.errors import ConfigError
from lpl_pretrain.losses.lpl.panels import (
    CELL_PX,
    GAP_PX,
    LEFT_PX,
    TOP_PX,
    choose_rows,
    heatmap,
)
from lpl_pretrain.trainer.loop import save_panels
from tests.support.autoencoders import tiny_distilled
from tests.support.latents import tiny_dataset
from tests.support.updates import term
from tests.unit.trainer.test_update import new_run, one_update

STAGES = ["mid", "up0", "up1", "up2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def draw(run, path):
    save_panels(term(run), path)


def cell(path, row, column):
    left, top = LEFT_PX + column * (CELL_PX + GAP_PX), TOP_PX + row * (CELL_PX + GAP_PX)
    return np.asarray(Image.open(path))[top : top + CELL_PX, left : left + CELL_PX]


def test_a_row_for_every_sample_and_a_column_for_every_stage(data, tmp_path):
    run = new_run(data, tmp_path)
    one_update(run)
    draw(run, tmp_path / "lpl" / "a.png")
    rows = choose_rows(term(run).snapshot)
    levels = term(run).snapshot.noise_level[rows]
    assert 1 <= len(rows) <= 4 and (levels.diff() >= 0).all()
    size = LEFT_PX + (2 + len(STAGES)) * (CELL_PX + GAP_PX), TOP_PX + len(rows) * (CELL_PX + GAP_PX)
    assert Image.open(tmp_path / "lpl" / "a.png").size == size
    assert [path.name for path in (tmp_path / "lpl").iterdir()] == ["a.png"]
    assert all(cell(tmp_path / "lpl" / "a.png", 0, 2 + i).any() for i in range(len(STAGES)))


def test_equal_latents_are_black_and_a_damaged_corner_lights_up(data, tmp_path):
    run = new_run(data, tmp_path, lpl__stages=["mid"])
    one_update(run)
    seen, row = term(run).snapshot, choose_rows(term(run).snapshot)[0]
    seen.z0_hat = seen.z0.clone()
    draw(run, tmp_path / "same.png")
    assert not cell(tmp_path / "same.png", 0, 2).any() and np.array_equal(
        cell(tmp_path / "same.png", 0, 0), cell(tmp_path / "same.png", 0, 1)
    )
    seen.z0_hat[row, :, :3, :3] += 3.0
    draw(run, tmp_path / "damaged.png")
    error = cell(tmp_path / "damaged.png", 0, 2).astype(float)
    half = CELL_PX // 2
    assert error[:half, :half].mean() > 2 * error[half:, half:].mean()


def test_no_panels_with_a_closed_gate_or_before_start_step(data, tmp_path):
    run = new_run(data, tmp_path, lpl__start_step=5)
    one_update(run)
    draw(run, tmp_path / "none.png")
    run = new_run(data, tmp_path)
    one_update(run)
    term(run).snapshot.weights.zero_()
    draw(run, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_microbatches_without_lpl_samples_are_not_shown(data, tmp_path):
    run = new_run(data, tmp_path, batch__micro_batch_size=2, lpl__sample_fraction=0.3)
    assert run.microbatch_plans(0)[0].num_lpl == 1 and run.microbatch_plans(0)[-1].num_lpl == 0
    one_update(run)
    draw(run, tmp_path / "a.png")
    assert cell(tmp_path / "a.png", 0, 2).any()


@pytest.mark.parametrize(
    "lpl",
    [
        {"normalize": {"over": "batch"}},
        {"crop": {"side": 4, "halo": 1}},
        {"preset": "diffusers_script"},
    ],
    ids=str,
)
def test_panels_for_every_option(data, tmp_path, lpl):
    run = new_run(data, tmp_path, **{f"lpl__{key}": value for key, value in lpl.items()})
    one_update(run)
    draw(run, tmp_path / "a.png")
    assert cell(tmp_path / "a.png", 0, 2).any()


def test_another_decoder_gives_the_maps_and_the_autoencoder_the_images(data, tmp_path):
    tiny_distilled().save_pretrained(tmp_path / "other")
    for name, options in (("own", {}), ("other", {"lpl__decoder": str(tmp_path / "other")})):
        run = new_run(data, tmp_path, **options)
        one_update(run)
        draw(run, tmp_path / f"{name}.png")
    own, other = tmp_path / "own.png", tmp_path / "other.png"
    assert (
        Image.open(own).width - Image.open(other).width == CELL_PX + GAP_PX
    )  # the distilled one has no up2
    assert [
        np.array_equal(cell(own, 0, column), cell(other, 0, column)) for column in range(3)
    ] == [True, True, False]


def test_a_missing_autoencoder_is_an_error_and_leaves_no_file(data, tmp_path):
    run = new_run(data, tmp_path)
    one_update(run)
    lpl = term(run)
    lpl._panel_source = replace(lpl._panel_source, autoencoder=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="gone"):
        draw(run, tmp_path / "lpl" / "a.png")
    assert not (tmp_path / "lpl").exists()


def test_panels_do_not_change_training(data, tmp_path):
    results = []
    for pictures in (False, True):
        run = new_run(data, tmp_path)
        one_update(run)
        if pictures:
            random_state = torch.get_rng_state()
            draw(run, tmp_path / "a.png")
            assert torch.equal(torch.get_rng_state(), random_state)
        results.append(one_update(run, step=1))
    assert (
        all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0]))
        and results[0][1] == results[1][1]
    )


def test_rows_are_spread_over_the_noise_levels(data, tmp_path):
    run = new_run(data, tmp_path)
    one_update(run)
    seen = replace(
        term(run).snapshot,
        noise_level=torch.arange(10.0).flip(0),
        weights=torch.tensor([0.0, *[1.0] * 9]),
    )
    assert choose_rows(seen) == [9, 6, 4, 1]


def test_one_scale_for_a_stage():
    dim, bright = heatmap([torch.full((4, 4), 0.1), torch.full((4, 4), 1.0)])
    assert dim.tolist()[0][0] == [77, 0, 0] and bright.tolist()[0][0] == [255, 255, 255]
