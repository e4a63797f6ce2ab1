"""The benchmarks: the same work for all, counted right, told apart by round, and readable afterwards. Nothing here asserts a speed."""

import json
import os
import shutil

import pytest
import torch
from conftest import REPOSITORY
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode

from ptv2.bench import accuracy, answer, contenders, leads, roofline, scale, shapes, tables, train
from ptv2.bench.rounds import Process, spread
from ptv2.cli import main
from ptv2.methods import build_model
from ptv2.prefix import PrefixConfig


def arithmetic(base: int) -> dict:
    return {"add": lambda x: base + x, "fail": lambda: 1 // 0, "die": lambda: os._exit(1)}


@pytest.fixture
def setting(tiny_bert):
    return train.Setting(str(tiny_bert), batch_size=3, rounds=2, prefix_length=4, threads=1)


def test_a_process_answers_and_tells_what_went_wrong():
    process = Process(arithmetic, 40)
    process.wait()
    assert [process.ask("add", 2), process.ask("add", 3)] == [42, 43]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        process.ask("fail")
    other = Process(arithmetic, 1)
    other.wait()
    with pytest.raises(RuntimeError, match="ended before it answered"):
        other.ask("die")
    process.stop(), other.stop()


def test_spread_is_the_median_and_the_ends():
    assert spread([5.0, 1.0, 9.0, 2.0]) == {"median": 3.5, "min": 1.0, "max": 9.0}


def test_batches_are_whole_alike_each_time_and_go_from_short_to_long(setting):
    batches, again = train.real_batches(setting), train.real_batches(setting)
    assert [batch["input_ids"].shape[0] for batch in batches] == [3, 3]
    assert batches[0]["attention_mask"].sum() < batches[1]["attention_mask"].sum()
    for batch, other in zip(batches, again, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in batch)
        assert {"start_positions", "end_positions"} <= set(batch)


@torch.no_grad()
def test_padding_to_the_official_length_leaves_the_loss_as_it_was(setting):
    batch = train.real_batches(setting)[0]
    padded = {name: train._padded(part, contenders.OFFICIAL_LENGTH) for name, part in batch.items()}
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (3, 384)
    assert torch.equal(padded["start_positions"], batch["start_positions"])
    model = build_model("p-tuning-v2", setting.backbone, PrefixConfig(prefix_length=4), precision="fp32").eval()
    torch.testing.assert_close(model(**padded).loss, model(**batch).loss)


def test_peers_train_what_ours_trains(setting):
    counted = {}
    for name in ("peft-fp32", "peft-lora", "full-fp32", "ptv2-fp32"):
        model = contenders.prepared(name, setting.backbone, setting.prefix_length)
        assert isinstance(model, PeftModel) == name.startswith("peft")
        counted[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted["peft-fp32"] == counted["ptv2-fp32"] == 4 * 2 * 2 * 32 + 2 * 32 + 2  # P·2·L·E and the head
    assert counted["full-fp32"] > 10 * counted["ptv2-fp32"]


def test_least_work_is_what_a_flop_counter_sees_less_what_can_be_avoided(setting):
    """Without padding, torch's own counter sees our step do this work and, in the first layer's attention, a little more."""
    model = build_model("p-tuning-v2", setting.backbone, PrefixConfig(prefix_length=4), precision="fp32").train()
    S, P, B, E, L, F = 11, 4, 2, 32, 2, 64
    batch = {"input_ids": torch.full((B, S), 7), "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}
    layers = roofline.linear_layers(model, batch)
    assert len(layers) == 6 * L and [passes for *_, passes in layers].count(False) == 3  # the first queries, keys and values
    least = roofline.least_work(layers, [S] * B, model)
    counter = FlopCounterMode(display=False)
    with counter:
        model(**batch).loss.backward()
    seen = {str(operator).removeprefix("aten."): count for operator, count in counter.get_flop_counts()["Global"].items()}
    head = 3 * 2 * B * S * E * 2  # forward, and both gradients
    assert seen["addmm"] + seen["mm"] - head == least.linear
    forward = L * 4 * B * S * (P + S) * E
    by_hand = B * S * ((4 * E * E + 2 * E * F) * 2 * (2 * L) - 3 * E * E * 2)
    assert least.linear == by_hand
    assert least.attention == forward + (L - 1) * 2 * forward / L + 6 * B * S * P * E
    assert least.total == least.linear + least.attention


def test_a_profile_shares_out_the_whole_step(setting):
    model = build_model("p-tuning-v2", setting.backbone, PrefixConfig(prefix_length=4), precision="fp32").train()
    shares = roofline.profile_step(lambda batch: model(**batch).loss.backward(), train.real_batches(setting)[0])
    assert sum(shares.values()) == pytest.approx(1)
    assert {"matrix products", "attention, forward", "attention, backward", "GELU", "layer norm"} <= set(shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_product_rate_is_a_rate(dtype):
    assert 1e6 < roofline.product_rate([(32, 64, True), (64, 32, False)], 48, dtype, torch.device("cpu")) < 1e15


def assert_readable(record: dict, folder, *titles: str) -> None:
    record = json.loads(json.dumps(record))  # as it comes back from a file
    assert all(title in tables.table(record) for title in titles)
    tables.draw(record, folder / "figure")
    assert (folder / "figure.svg").stat().st_size > 5000 and (folder / "figure.png").stat().st_size > 5000
    assert {"command", "date", "versions", "git_commit", "machine", "setting"} <= set(record)
    assert record["setting"]["data"] == "embedded" and record["setting"]["threads"] == 1


def test_training_is_measured_in_turn_and_compared_round_by_round(setting, tmp_path):
    record = train.bench_train(setting, ["peft-fp32", "ptv2-fp32"], "ptv2 bench train")
    peer, ours = (record["methods"][name]["seconds"] for name in ("peft-fp32", "ptv2-fp32"))
    assert len(peer) == len(ours) == 2 and record["batches"][0][0] == 3
    assert record["ratios"]["ptv2-fp32"]["peft-fp32"] == spread([peer[0] / ours[0], peer[1] / ours[1]])
    assert record["methods"]["ptv2-fp32"]["tokens_per_second"]["max"] == pytest.approx(
        max(n / t for n, t in zip(record["tokens"], ours, strict=True))
    )
    assert 0 < record["limits"]["ptv2-fp32"]["share"]["median"] < 1
    assert_readable(record, tmp_path, "PEFT prefix tuning, buckets", "ptv2, fp32", "matrix products")


def test_answering_is_measured_against_the_plain_backbone(setting, tmp_path):
    record = answer.bench_answer(setting, ["plain", "peft-prefix", "ptv2-8"], "ptv2 bench answer")
    plain, ours = (record["methods"][name] for name in ("plain", "ptv2-8"))
    assert plain["of_plain"] == {"median": 1, "min": 1, "max": 1}
    assert ours["of_plain"] == spread([a / b for a, b in zip(plain["seconds"], ours["seconds"], strict=True)])
    assert 0 < ours["latency_ms"]["p50"] <= ours["latency_ms"]["p95"]
    assert_readable(record, tmp_path, "backbone with a span head", "ptv2, 8 prefixes mixed")


def test_scale_has_a_point_for_every_value(setting, tmp_path):
    grids = {"prefix length": (6,), "questions": (20,)}
    record = scale.bench_scale(setting, grids, "ptv2 bench scale")
    points = {quantity: [(p["name"], p["value"]) for p in curve] for quantity, curve in record["curves"].items()}
    expected = [("ptv2-fp32", 6), ("full-fp32", 6)]
    assert points == {"prefix length": expected, "questions": [("data", 20)]}
    assert all(point["seconds"]["median"] > 0 for curve in record["curves"].values() for point in curve)
    assert_readable(record, tmp_path, "prefix length", "questions")


def test_accuracy_gives_every_method_the_same_time(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RECIPES", {name: accuracy.RECIPES[name] for name in ("ptv2-fp32", "peft", "full")})
    record = accuracy.bench_accuracy(setting, 0.01, "ptv2 bench accuracy", evaluations=2)
    for method in record["methods"].values():
        first, last = method["curve"]
        # A busy machine may take the whole time for the first steps.
        assert 0.005 <= first["minutes"] <= last["minutes"] and last["minutes"] >= 0.01
        assert 0 < first["windows"] <= last["windows"] and 0 <= last["f1"] <= 100
    assert_readable(record, tmp_path, "PEFT prefix tuning", "full fine-tuning")


def test_rates_rise_and_fall_as_the_recipe_says():
    linear, cosine = (accuracy.Recipe("", "", 1.0, 1.0, 8, "", warmup=0.2, cosine=cosine) for cosine in (False, True))
    for recipe, halfway in ((linear, 0.5), (cosine, 0.5)):
        assert [recipe.factor(passed) for passed in (0.0, 0.1, 0.2)] == pytest.approx([0, 0.5, 1])
        assert [recipe.factor(passed) for passed in (0.6, 1.0, 1.1)] == pytest.approx([halfway, 0, 0])
    assert cosine.factor(0.4) > linear.factor(0.4) == pytest.approx(0.75)


def test_every_lead_computes_what_is_done_now():
    generator = torch.Generator().manual_seed(0)
    for D in (32, 8):  # for the one, attention is fused
        text = [torch.randn(2, 3, 7, D, generator=generator) for _ in range(3)]
        prefix = tuple(torch.randn(3, 4, D, generator=generator) for _ in range(2))
        for way in leads.ATTENTION.values():
            torch.testing.assert_close(way(*text, prefix), leads.now(*text, prefix), atol=1e-5, rtol=1e-5)


def curve(*points: tuple[float, float]) -> dict:
    return {"curve": [{"minutes": minutes, "f1": f1} for minutes, f1 in points]}


def test_how_much_sooner_is_read_off_the_curve():
    methods = {
        "peft": curve((5, 10), (10, 20)),
        "at a point": curve((2, 20), (10, 60)),
        "between points": curve((2, 10), (4, 30), (10, 50)),  # 20 after 3 minutes
        "before the first": curve((2, 40), (10, 60)),  # 20 after 1 minute
        "never": curve((5, 10), (10, 19.9)),
    }
    assert accuracy.sooner(methods) == {"at a point": 5, "between points": pytest.approx(10 / 3), "before the first": 10, "never": None}


def test_the_command_prints_one_object_and_a_table(tiny_bert, tmp_path, capsys):
    options = ["--backbone", str(tiny_bert), "--quick", "--rounds", "1", "--threads", "1", "--only", "ptv2-fp32"]
    assert main(["bench", "train", *options, "--output", str(tmp_path / "record.json"), "--plot", str(tmp_path / "plot")]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record == json.loads((tmp_path / "record.json").read_text()) and list(record["methods"]) == ["ptv2-fp32"]
    assert "| training | examples/s |" in printed.err and record["command"].startswith("ptv2 bench train --backbone")
    assert (tmp_path / "plot.svg").is_file()


def test_a_shape_stands_for_a_backbone(monkeypatch, capsys, tmp_path):
    assert [(c.num_hidden_layers, c.hidden_size) for c in shapes.SHAPES.values()] == [(12, 768), (24, 1024)]
    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 64}
    for shape, config in shapes.SHAPES.items():
        monkeypatch.setitem(shapes.SHAPES, shape, type(config)(**{**config.to_dict(), **small}))
        shapes.write_backbone(shape, tmp_path / shape)
        (batch,) = train.real_batches(train.Setting(str(tmp_path / shape), batch_size=2, rounds=1))
        assert contenders.prepared("ptv2-fp32", str(tmp_path / shape), 4)(**batch).loss.isfinite()
    assert main(["bench", "train", "--shape", shape, "--quick", "--rounds", "1", "--threads", "1", "--only", "ptv2-fp32"]) == 0
    assert json.loads(capsys.readouterr().out)["setting"]["backbone"] == f"random weights, shape of {shape}"
    assert main(["bench", "accuracy", "--shape", "bert-base"]) == 2
    assert "--shape has random weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "ours"], "--only names ours; choose from peft-padded, peft-fp32"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--minutes", "0"], "--minutes is 0.0; it must be above 0"),
    ],
)
def test_bad_options_have_their_sentence(options, said, capsys):
    assert main(["bench", "train", *options]) == 2
    assert said in capsys.readouterr().err


def test_the_tables_in_the_texts_are_those_of_the_records(tmp_path):
    texts = [REPOSITORY / "README.md", REPOSITORY / "results" / "speed.md"]
    copies = [tmp_path / text.name for text in texts]
    for text, copy in zip(texts, copies, strict=True):
        copy.write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    recorded = tmp_path / "speed"
    shutil.copytree(REPOSITORY / "results" / "speed", recorded)
    tables.report(recorded, copies)
    for text, copy in zip(texts, copies, strict=True):
        assert copy.read_text(encoding="utf-8") == text.read_text(encoding="utf-8"), f"{text.name}: run make report"
    for figure in (REPOSITORY / "results" / "speed").glob("*.svg"):
        assert (recorded / figure.name).stat().st_size == pytest.approx(figure.stat().st_size, rel=0.2)
