"""TensorBoard's own reader finds what the tracker wrote."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lpl_pretrain.trackers.tensorboard import TensorBoardTracker


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def record(step, value):
    entry = {"metric": "fid", "weights": "ema", "guidance_scale": 2.5, "value": value}
    return {"step": step, "protocol": {"name": "quick"}, "results": [entry]}


def test_metrics_and_scores_are_read_back(tmp_path):
    trainer = TensorBoardTracker(tmp_path)
    for step in (10, 20):
        trainer.metrics(step, {"loss/total": 1 / step})
    trainer.event("resumed", 20, {"world_size": 2})
    trainer.close()
    evaluator = TensorBoardTracker(tmp_path)
    evaluator.score(record(10, 9.0))
    evaluator.close()
    read = scalars(tmp_path)
    assert read["loss/total"] == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]
    assert read["evaluation/quick/fid/ema_w2.5"] == [(10, 9.0)]


def test_a_restart_hides_the_steps_that_it_repeats(tmp_path):
    for steps in ((10, 20, 30), (20, 30)):
        tracker = TensorBoardTracker(tmp_path)
        for step in steps:
            tracker.metrics(step, {"loss/total": float(step)})
        tracker.close()
    assert [step for step, _ in scalars(tmp_path)["loss/total"]] == [10, 20, 30]
