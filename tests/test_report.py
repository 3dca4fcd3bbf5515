"""Reports, calibration and comparison of runs, read back from the files that they write."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import exitkit
from exitkit import ExitkitError, ExitOutputs
from exitkit.evaluation import RegressionOutputs, paired_tests
from exitkit.report import (
    Stage,
    calibrated,
    read_comparison,
    read_run,
    stages_of,
    write_report,
    write_samples,
    write_thresholds,
)
from exitkit.report.points import points_of
from exitkit.surgery.fingerprint import fingerprint_of, same_weights
from tests import toy


def made(samples: int = 400, exits: int = 3, classes: int = 4, seed: int = 0, **others: Any) -> ExitOutputs:
    """Outputs whose later exits are surer and better."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    logits = torch.randn(samples, exits + 1, classes, generator=generator)
    logits[torch.arange(samples), :, labels] += torch.linspace(0.5, 4, exits + 1)
    return ExitOutputs(logits, labels, 100.0 * torch.arange(1, exits + 2), 380.0, **others)


def run_of(directory: Path, **outputs: ExitOutputs) -> Path:
    for name, one in outputs.items():
        one.save(directory / f"outputs-{name}.safetensors")
    return directory


def data_of(page: Path) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "patience"])
@pytest.mark.parametrize("classes", [4, 20])
def test_every_point_of_the_slider_is_what_the_outputs_give_there(criterion: str, classes: int) -> None:
    outputs = made(classes=classes, criterion=criterion)
    points = points_of(outputs, most=40)
    assert outputs.labels is not None
    for place, tau in enumerate(points.curve.thresholds):
        exits = outputs.exits_at(tau)
        answers = outputs.answers.numpy()[np.arange(len(outputs)), exits]
        expected = outputs.curve().at_threshold(tau)
        assert points.exits[place].tolist() == np.bincount(exits, minlength=4).tolist()
        assert points.right[place] / len(outputs) == expected.accuracy == points.curve.accuracy[place]
        assert points.curve.cost[place] == expected.cost
        assert ((points.passes <= place).cumprod(1).sum(1) == exits).all()
        pairs = list(zip(outputs.labels.tolist(), answers.tolist(), strict=True))
        if classes == 4:
            assert np.reshape(points.confusion[place], (4, 4)).tolist() == [
                [pairs.count((label, answer)) for answer in range(4)] for label in range(4)
            ]
        else:
            counts = [count for *_, count in points.confusion[place]]
            assert counts == sorted(counts, reverse=True)
            assert all(
                pairs.count((label, answer)) == count and label != answer
                for label, answer, count in points.confusion[place]
            )


def test_thinned_points_keep_ends_best_budgets_and_the_chosen_threshold() -> None:
    outputs = made(2_000)
    curve = outputs.curve()
    points = points_of(outputs, chosen=0.7, most=50)
    wanted = [curve.best(), curve.no_limit(), curve.at_budget(0.5), curve.at_budget(0.75)]
    shown = set(zip(points.curve.thresholds, points.curve.accuracy, points.curve.cost, strict=True))
    assert len(curve.cost) > 4_000
    assert len(shown) < 60
    assert {(point.threshold, point.accuracy, point.cost) for point in wanted} <= shown
    start = points.start
    expected = curve.at_threshold(0.7)
    assert (points.curve.accuracy[start], points.curve.cost[start]) == (expected.accuracy, expected.cost)
    assert points.curve.thresholds[start] == expected.threshold == 0.7
    assert (np.diff(points.curve.thresholds) > 0).all()
    for place in (start - 1, start, start + 1):
        assert points.exits[place].tolist() == np.bincount(outputs.exits_at(points.curve.thresholds[place])).tolist()


def test_report_is_one_page_with_figures_beside_it(tmp_path: Path) -> None:
    outputs = made()
    page = write_report([run_of(tmp_path, sdn=outputs, pbee=replace(outputs, criterion="patience"))])
    text = page.read_text("utf-8")
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    assert "@import" not in text
    names = {path.name for path in tmp_path.iterdir() if path.name.startswith("report")}
    stems = ["curve", "hindsight"] + [
        f"{k}-{m}" for k in ("reliability", "exits", "confusion") for m in ("sdn", "pbee")
    ]
    assert names == {"report.html", *(f"report-{stem}.{kind}" for stem in stems for kind in ("png", "csv"))}
    with (tmp_path / "report-curve.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "sdn"]
    for row in rows:
        point = outputs.curve().at_threshold(float(row["threshold"]))
        assert (float(row["accuracy"]), float(row["cost"])) == (point.accuracy, point.cost)
    assert [method["name"] for method in data_of(page)["methods"]] == [
        "sdn",
        "pbee",
    ]  # more accurate at half of the MACs


def test_the_report_opens_on_the_cheapest_promise_and_says_what_it_saves_and_loses(tmp_path: Path) -> None:
    good = made(3_000)
    outputs = {"alpha": replace(good, criterion="patience"), "beta": good}
    chosen = {name: calibrated(one, None, 0.5, 0, max_drop=0.05) for name, one in outputs.items()}
    best = min(chosen, key=lambda name: chosen[name].chosen.cost or 1.0)
    assert best == "beta"  # not the first by the alphabet
    run_of(tmp_path, **outputs)
    write_thresholds(tmp_path, chosen)
    page = write_report([tmp_path])
    text = re.sub(r"\s+", " ", page.read_text("utf-8"))
    policy = chosen["beta"].chosen
    exits = good.exits_at(policy)
    assert good.labels is not None
    accuracy = float((good.answers.numpy()[np.arange(3_000), exits] == good.labels.numpy()).mean())
    cost = float((good.macs.numpy()[exits] / 380.0).mean())
    lost = 100 * (float(good.accuracy()[-1]) - accuracy)
    assert f"beta saves {100 - 100 * cost:.0f}% of the computation and loses {lost:.2f} points of accuracy: " in text
    assert f"{accuracy:.2%} instead of {good.accuracy()[-1]:.2%}." in text
    assert f"{1 / cost:.2f}×" in text
    assert "at most, by MACs. What counts is time, which was not measured" in text
    assert text.count(str(policy.guarantee)) == 1
    assert str(chosen["alpha"].chosen.guarantee) == str(policy.guarantee)  # and so it stands there once
    assert f"exitkit export {tmp_path} --method beta</code>" in text
    assert [method["name"] for method in data_of(page)["methods"]] == ["beta", "alpha"]
    assert text.index("What is promised") < text.index("What is confused")


def test_without_a_promise_the_command_carries_the_threshold(tmp_path: Path) -> None:
    outputs = made()
    text = write_report([run_of(tmp_path, sdn=outputs)]).read_text("utf-8")
    tau = float(re.search(r"--method sdn --threshold (\S+)</code>", text)[1])  # type: ignore[index]
    assert outputs.at(tau) == replace(outputs.curve().at_budget(0.5), policy=outputs.at(tau).policy)
    assert "exitkit calibrate gives one" in text


def test_budgets_are_also_shown_in_top_k_accuracy(tmp_path: Path) -> None:
    outputs = made()
    run = run_of(tmp_path, sdn=outputs)
    text = write_report([run], top=3).read_text("utf-8")
    row = re.search(r"sdn, top 3</th>(.*?)</tr>", text, flags=re.S)
    assert row is not None
    assert f"{outputs.curve(top=3).at_budget(0.5).accuracy:.2%}" in row[1]
    with pytest.raises(exitkit.ArgumentError, match="top=99"):
        write_report([run], top=99)


def test_exits_that_save_nothing_are_not_praised(tmp_path: Path) -> None:
    outputs = replace(made(300), backbone_macs=90.0)  # the first exit costs more than the backbone
    text = write_report([run_of(tmp_path, sdn=outputs)]).read_text("utf-8")
    assert "Exits save nothing here: use the backbone as it is." in text
    assert "exitkit export" not in re.sub(r'<script type="application/json".*', "", text, flags=re.S)


def test_the_measured_speedup_is_the_one_that_counts(tmp_path: Path) -> None:
    outputs = made(exits=1)
    stages = [Stage("a", 1, 1, 3.0, 1.0, 8), Stage("backbone", 1, 0, 2.0, 0.0, 8)]
    (tmp_path / "results.json").write_text(
        json.dumps({"about": {"device": "a CPU"}, "methods": {"sdn": {"stages": [vars(stage) for stage in stages]}}})
    )
    outputs = replace(outputs, macs=torch.tensor([150.0, 390.0]))
    text = re.sub(r"\s+", " ", write_report([run_of(tmp_path, sdn=outputs)]).read_text("utf-8"))
    behind = float((outputs.exits_at(outputs.curve().at_budget(0.5)) == 1).mean())
    assert f"<dd>{4.0 / (3.0 + 2.0 * behind):.2f}×</dd>" in text
    assert "measured, which is what counts, on a CPU; MACs allow" in text


def test_classes_have_the_names_of_classes_txt(tmp_path: Path) -> None:
    outputs = made(40)
    folder, run = tmp_path / "photos" / "val", tmp_path / "run"
    folder.mkdir(parents=True)
    run.mkdir()
    data = TensorDataset(torch.rand(40, 3, 8, 8), torch.arange(40) % 4)
    data.classes, data.root = ["n01", "n02", "n03", "n04"], str(folder)  # type: ignore[attr-defined]
    (tmp_path / "photos" / "classes.txt").write_text("n04 gas pump\nn01 tench\nn02\tgolf ball\nn03 church\n")
    write_samples(run, data, {"sdn": outputs})
    names = ["tench", "golf ball", "church", "gas pump"]
    assert data_of(write_report([run_of(run, sdn=outputs)]))["classes"] == names
    (run / "classes.txt").write_text("one\ntwo words\nthree\nfour\n")
    assert data_of(write_report([run]))["classes"] == ["one", "two words", "three", "four"]
    (run / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(ExitkitError, match=r"classes\.txt' has 2 lines for 4 classes.*such as 'tench NAME'"):
        write_report([run])


def test_names_and_texts_are_shown_as_text_and_never_run(tmp_path: Path) -> None:
    outputs = made(8)
    texts = [("</script><script>alert(1)</script><b>", 0)] * 8
    write_samples(tmp_path, texts, {"sdn": outputs})
    document = json.loads((tmp_path / "samples.json").read_text()) | {"classes": ["$x_$", "</td>", "$", "'\""]}
    (tmp_path / "samples.json").write_text(json.dumps(document))
    (tmp_path / "results.json").write_text(json.dumps({"about": {"model": "<img onerror=x>"}}))
    page = write_report([run_of(tmp_path, sdn=outputs)])
    text = page.read_text("utf-8")
    assert "alert(1)</script>" not in text
    assert "<img onerror" not in text
    assert data_of(page)["pictures"][0]["text"] == texts[0][0]
    assert data_of(page)["classes"] == document["classes"]


def test_samples_are_few_and_the_telling_ones(tmp_path: Path) -> None:
    outputs = made(1_000)
    write_samples(tmp_path, TensorDataset(torch.rand(1_000, 3, 300, 200)), {"sdn": outputs})
    document = json.loads((tmp_path / "samples.json").read_text())
    rows = [sample["row"] for sample in document["samples"]]
    exits = outputs.exits_at(outputs.curve().at_budget(0.5).threshold)
    right = outputs.correct.numpy()[np.arange(1_000), exits]
    assert len(rows) == len(set(rows)) <= 72
    assert (tmp_path / "samples.json").stat().st_size < 1_000_000
    for kind in ((exits == 0) & right, exits == exits.max(), (exits < 3) & ~right):
        assert kind[rows].sum() >= 8


def test_gallery_knows_where_each_sample_leaves(tmp_path: Path) -> None:
    outputs = made()
    write_samples(tmp_path, [(f"text {row}",) for row in range(400)], {"sdn": outputs})
    data = data_of(write_report([run_of(tmp_path, sdn=outputs)]))
    method = data["methods"][0]
    exits = outputs.exits_at(method["thresholds"][method["start"]])
    for picture, sample in zip(data["pictures"], method["gallery"], strict=True):
        assert picture["text"] == f"text {picture['row']}"
        left = next((m for m, place in enumerate(sample["passes"]) if method["start"] < place), 3)
        assert left == exits[picture["row"]]
        assert sample["answers"] == outputs.answers[picture["row"]].tolist()


def test_stages_add_up_to_the_prices_of_the_exits() -> None:
    ee = exitkit.attach(toy.net(), toy.images(), method="ztw")
    stages = stages_of(ee, toy.images(4))
    assert [stage.exit for stage in stages] == [exit_.name for exit_ in ee.exits]
    assert sum(stage.macs for stage in stages) == toy.TOTAL
    spent = np.cumsum([stage.macs + stage.head_macs for stage in stages])
    assert spent.tolist() == [exit_.macs for exit_ in ee.exits]
    assert all((stage.milliseconds or 0) > 0 and stage.batch == 4 for stage in stages)
    assert all(stage.milliseconds is None for stage in stages_of(ee))


def test_stage_table_and_time_of_the_backbone(tmp_path: Path) -> None:
    stages = [
        Stage("a", 1e6, 1e5, 2.0, 0.5, 8),
        Stage("b", 2e6, 1e5, 3.0, 0.5, 8),
        Stage("backbone", 1e6, 0, 1.0, 0, 8),
    ]
    document = {"methods": {"sdn": {"stages": [vars(stage) for stage in stages]}}}
    (tmp_path / "results.json").write_text(json.dumps(document))
    page = write_report([run_of(tmp_path, sdn=made(exits=2))])
    assert data_of(page)["methods"][0]["backbone_milliseconds"] == 5.0
    assert data_of(page)["methods"][0]["names"] == ["a", "b", "backbone"]
    (tmp_path / "outputs-sdn.safetensors").unlink()
    with pytest.raises(ExitkitError, match="3 stages for 'sdn', whose outputs have 5"):
        write_report([run_of(tmp_path, sdn=made(exits=4))])


def test_calibration_is_checked_on_the_other_samples_and_kept(tmp_path: Path) -> None:
    outputs = made(3_000)
    one = calibrated(outputs, None, 0.5, 0, max_drop=0.05)
    order = torch.randperm(3_000, generator=torch.Generator().manual_seed(0))
    assert one.chosen == exitkit.choose_threshold(outputs[order[:1_500]], max_drop=0.05)
    rest = outputs[order[1_500:]]
    point = rest.curve().at_threshold(one.chosen.threshold)
    assert one.check is not None
    assert (one.check.samples, one.check.accuracy) == (1_500, point.accuracy)
    assert one.check.cost == pytest.approx(point.cost)
    assert one.check.backbone_accuracy == rest.accuracy()[-1]
    run_of(tmp_path, sdn=outputs, ztw=outputs)
    write_thresholds(tmp_path, {"sdn": one})
    write_thresholds(tmp_path, {"ztw": one})
    assert {name: result.calibrated for name, result in read_run(tmp_path).results.items()} == {"sdn": one, "ztw": one}
    page = write_report([tmp_path])
    assert str(one.chosen.guarantee) in page.read_text("utf-8")
    method = data_of(page)["methods"][0]
    assert method["right"][method["start"]] / 3_000 == outputs.curve().at_threshold(one.chosen.threshold).accuracy


def test_all_samples_may_choose_and_other_samples_may_be_given() -> None:
    outputs, other = made(2_000), made(1_000, seed=1)
    assert calibrated(outputs, None, 1, 0, max_drop=0.05).check is None
    one = calibrated(outputs, other, 0.5, 0, max_drop=0.05)
    assert one.chosen.guarantee.samples == 1_000
    assert one.check is not None
    assert one.check.samples == 2_000
    outputs, other = (replace(one, hashes=torch.arange(len(one))) for one in (outputs, other))
    with pytest.raises(ExitkitError, match="share 1000 of their 1000 samples"):
        calibrated(outputs, other, 0.5, 0, max_drop=0.05)


def test_labels_are_not_needed_for_a_promise_of_agreement() -> None:
    one = calibrated(replace(made(2_000), labels=None), None, 0.5, 0, max_drop=0.05, risk="disagreement")
    assert one.chosen.found
    assert one.check is not None
    assert one.check.accuracy is None


def test_several_runs_are_one_report_and_one_comparison(tmp_path: Path) -> None:
    outputs = made()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run_of(tmp_path / name, sdn=outputs)
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html")
    assert [method["name"] for method in data_of(page)["methods"]] == ["a/sdn", "b/sdn"]
    assert (tmp_path / "both-reliability-a-sdn.png").exists()
    assert list(read_comparison([tmp_path / "a", tmp_path / "b" / "outputs-sdn.safetensors"])) == ["a/sdn", "b/sdn"]
    assert list(read_comparison([tmp_path / "a"])) == ["sdn"]


@pytest.mark.parametrize("place", [".", "runs"])
def test_of_a_folder_of_runs_those_below_are_told(tmp_path: Path, place: str) -> None:
    """As ``exitkit reproduce --out`` leaves it: the runs of the rows, each with its seeds."""
    outputs = exitkit.ExitOutputs(torch.randn(20, 3, 2), torch.arange(20) % 2, torch.tensor([1.0, 2.0, 3.0]), 3.0)
    for name in ("row-b/seed-0", "row-a/seed-0", "row-a/seed-1", "alone"):
        run_of(tmp_path / "runs" / name, sdn=outputs)
    (tmp_path / "runs" / "empty").mkdir()
    with pytest.raises(ExitkitError) as told:
        write_report([tmp_path / place])
    first, second = str(told.value).splitlines()
    assert first.endswith("holds no run itself, but 3 below it")
    assert second.endswith(", ".join(str(tmp_path / "runs" / name) for name in ("alone", "row-a", "row-b")))
    write_report([tmp_path / "runs" / "row-a"])


def test_a_regression_is_reported_by_its_errors(tmp_path: Path) -> None:
    predictions = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.linspace(0, 1, 20)
    RegressionOutputs(predictions, labels, torch.tensor([1.0, 2.0, 3.0]), 3.0).save(
        tmp_path / "outputs-pbee.safetensors"
    )
    page = write_report([tmp_path]).read_text("utf-8")
    errors = ((predictions - labels[:, None]) ** 2).mean(0)
    assert all(f"<td>{error:.4f}</td>" in page for error in errors.tolist())
    assert (tmp_path / "report-curve.csv").read_text().splitlines()[0] == "method,threshold,mse,cost"
    with pytest.raises(ExitkitError, match="top=3 counts classes, and a regression has none"):
        write_report([tmp_path], top=3)
    run_of(
        tmp_path / "classifier",
        sdn=exitkit.ExitOutputs(torch.randn(20, 3, 2), torch.arange(20) % 2, torch.tensor([1.0, 2.0, 3.0]), 3.0),
    )
    with pytest.raises(ExitkitError, match="a regression and a classifier\nGive those of one kind"):
        write_report([tmp_path, tmp_path / "classifier"])


def test_a_regression_is_told_what_takes_the_place_of_a_test(tmp_path: Path) -> None:
    predictions = torch.randn(20, 3)
    RegressionOutputs(predictions, predictions[:, 2], torch.tensor([1.0, 2.0, 3.0]), 3.0).save(
        tmp_path / "outputs-pbee.safetensors"
    )
    with pytest.raises(ExitkitError, match=r"regression.*RegressionOutputs\.load\(path\).*curve\(\)\.plot"):
        read_run(tmp_path)
    (read,) = read_comparison([tmp_path]).values()
    assert isinstance(read, RegressionOutputs)


def test_other_weights_of_one_architecture_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = toy.TinyNet().eval(), toy.TinyNet().eval()
    loader = [(toy.images(40), torch.arange(40) % 3)]
    outputs = {
        name: exitkit.collect(exitkit.attach(net, toy.images(), at=["blocks.1"]), loader)
        for name, net in {"one": first, "again": first, "other": second}.items()
    }
    run_of(tmp_path, **outputs)
    kept = ExitOutputs.load(tmp_path / "outputs-one.safetensors").weights
    assert kept is not None
    assert same_weights(kept, fingerprint_of(first.half()))  # the same, in half precision
    tests = paired_tests(read_comparison([tmp_path]), 1.5, resamples=40)
    told = {frozenset((pair.first, pair.second)): pair.same_backbone for pair in tests.pairs}
    assert told == {
        frozenset(("one", "again")): True,
        frozenset(("one", "other")): False,
        frozenset(("again", "other")): False,
    }
    assert "again – other *" in str(tests)
    assert "* their backbones have other weights" in str(tests)
    shown = (
        r"backbone of (other has other weights than that of (again|one)|(again|one), (again|one) has .* that of other)"
    )
    assert re.search(shown, write_report([tmp_path]).read_text("utf-8"))


def test_what_cannot_be_reported_is_refused_in_words(tmp_path: Path) -> None:
    outputs, empty = made(), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ExitkitError, match="holds no results: no outputs-METHOD"):
        write_report([empty])
    with pytest.raises(ExitkitError, match="is not a directory"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(ExitkitError, match="different backbones"):
        write_report([run_of(tmp_path, a=outputs, b=replace(outputs, backbone_macs=500.0))])
    with pytest.raises(ExitkitError, match="different backbones"):
        read_comparison([tmp_path])
    with pytest.raises(ExitkitError, match="other labels"):
        write_report([run_of(tmp_path, b=made(300))])
    with pytest.raises(ExitkitError, match=r"must end in \.html"):
        write_report([run_of(tmp_path, b=outputs)], tmp_path / "report.pdf")
    with pytest.raises(ExitkitError, match="labels=None in the outputs 'b'"):
        write_report([run_of(tmp_path, b=replace(outputs, labels=None))])
    with pytest.raises(ExitkitError, match="cannot be written"):
        write_report([run_of(tmp_path, b=outputs)], tmp_path / "outputs-b.safetensors" / "report.html")
    with pytest.raises(ExitkitError, match="at least one run"):
        write_report([])
    with pytest.raises(ExitkitError, match="resamples=0"):
        exitkit.evaluation.paired_tests({"a": outputs, "b": outputs}, resamples=0)
    with pytest.raises(ExitkitError, match="holds a name twice"):
        write_report([run_of(tmp_path, b=outputs), tmp_path])
    with pytest.raises(ExitkitError, match="share=0"):
        calibrated(outputs, None, 0, 0)
    with pytest.raises(ExitkitError, match="dataset holds 3 samples"):
        write_samples(tmp_path, ["a", "b", "c"], {"sdn": outputs})


@pytest.mark.parametrize("name", ["results.json", "samples.json", "thresholds.json"])
@pytest.mark.parametrize("content", ["{", "[1]", '{"samples": [{}], "sdn": {}, "methods": {"sdn": {"stages": [1]}}}'])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    run_of(tmp_path, sdn=made())
    (tmp_path / name).write_text(content)
    with pytest.raises(ExitkitError, match=name):
        write_report([tmp_path])
    assert not (tmp_path / "report.html").exists()
