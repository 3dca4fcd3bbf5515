"""Multi-exit models under transformers.Trainer and Lightning, and data sets of the datasets library as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import exitkit
from exitkit import ExitkitError
from exitkit.exits.standardised import StandardisedLinear
from tests.toy import TinyNet

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def bert(classes: int = 3) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=classes,
    )
    return transformers.BertForSequenceClassification(config).eval()


class Texts(Dataset[Any]):
    """Texts of eight tokens whose first token is their class."""

    column_names = ("input_ids", "attention_mask", "label", "idx")

    def __init__(self, samples: int = 60) -> None:
        self.ids = torch.randint(5, 40, (samples, 8), generator=torch.Generator().manual_seed(1))
        self.ids[:, 0] = torch.arange(samples) % 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        ids = self.ids[row]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "label": int(ids[0]),
            "idx": row,
            "raw": "text",
        }


def arguments(folder: Path, **others: Any) -> Any:
    given = {"num_train_epochs": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 20, "report_to": "none"}
    return transformers.TrainingArguments(
        str(folder), **{**given, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **others}
    )


def standardise(ee: exitkit.MultiExitModel) -> bool:
    """Whether the heads were trained in training mode, in which alone they learn what to standardise by; evaluated now."""
    layers = [layer for layer in ee.classifiers.modules() if isinstance(layer, StandardisedLinear)]
    return bool(layers) and all(layer.batches > 0 for layer in layers) and not ee.training


# --- labels= ------------------------------------------------------------------------------------------------------


def test_labels_give_the_sum_of_every_exits_loss_and_change_no_answer(tiny_ee: exitkit.MultiExitModel) -> None:
    tiny_ee.eval()
    x, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 1, 0])
    plain, output = tiny_ee(x), tiny_ee(x, labels=labels)
    assert plain.loss is None
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, output.logits, strict=True))
    expected = sum(F.cross_entropy(logits, labels) for logits in plain.heads)
    assert torch.allclose(output.loss, expected)
    assert output["loss"] is output[0] is output.loss
    assert output["logits"] is output[1] is output.logits
    assert output[1:] == (output.logits,)
    assert plain[0] is plain.logits
    with pytest.raises(KeyError):
        output["hidden_states"]


def test_auxiliary_losses_are_part_of_the_sum(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, torch.randn(2, 1, 8, 8), method="gpf").eval()
    output = ee(torch.randn(4, 1, 8, 8), labels=torch.tensor([0, 1, 2, 0]))
    assert output.auxiliary is not None
    alone = sum(F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])) for logits in output.heads)
    assert torch.allclose(output.loss, alone + sum(output.auxiliary))


def test_a_backbone_that_takes_labels_is_not_told_of_them() -> None:
    backbone = bert()
    ee = exitkit.attach(backbone, method="sdn")
    seen = []
    backbone.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    batch = {key: Texts().ids[:4] for key in ("input_ids",)} | {"attention_mask": torch.ones(4, 8, dtype=torch.long)}
    output = ee(**batch, labels=torch.tensor([0, 1, 2, 0]))
    assert "labels" not in seen[0]
    assert torch.equal(output.logits[-1], backbone(**batch).logits)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in ee.classifiers.parameters())


def test_labels_that_do_not_fit_are_named(tiny_ee: exitkit.MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match=r"labels run from 0 to 7, but the model has 3 classes"):
        tiny_ee(torch.randn(2, 1, 8, 8), labels=torch.tensor([0, 7]))


def test_labels_among_example_inputs_are_left_out() -> None:
    ids = Texts().ids[:2]
    ee = exitkit.attach(bert(), {"input_ids": ids, "labels": ids[:, 0]}, method="sdn").eval()
    exits = exitkit.compile(ee, 2.0)(input_ids=ids).exit
    assert exits.tolist() == [2, 2]


# --- what tokenizers write ----------------------------------------------------------------------------------------


def test_the_engine_takes_token_type_ids_that_are_all_zero_and_refuses_others() -> None:
    ee = exitkit.attach(bert(), method="sdn").eval()
    engine = exitkit.compile(ee, 2.0)
    ids = Texts().ids[:4]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    zeros = torch.zeros_like(ids)
    assert torch.equal(engine(**batch, token_type_ids=zeros).logits, engine(**batch).logits)
    assert torch.equal(ee(**batch, token_type_ids=zeros).logits[-1], ee(**batch).logits[-1])
    with pytest.raises(ExitkitError, match=r"token_type_ids tell two texts apart.*example_inputs=dict\(tokenizer\("):
        engine(**batch, token_type_ids=torch.ones_like(ids))
    with pytest.raises(ExitkitError, match=r"attached with tensor inputs.*but was called with.*'position_ids'"):
        engine(**batch, position_ids=zeros)


def test_a_model_attached_with_token_type_ids_reads_them() -> None:
    ids = Texts().ids[:4]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": (ids > 20).long()}
    ee = exitkit.attach(bert(), batch, method="sdn").eval()
    assert torch.allclose(exitkit.compile(ee, 2.0)(**batch).logits, ee.backbone(**batch).logits)


def zero_segments_models() -> list[Any]:
    """A tiny model of every architecture whose tokenizer writes token_type_ids of 0 for one text."""
    small = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    kinds = [
        "Bert",
        "Albert",
        "Electra",
        "Deberta",
        "DebertaV2",
        "MobileBert",
        "ConvBert",
        "Roberta",
        "MPNet",
        "RemBert",
    ]
    found = []
    for kind in kinds:
        config, model = getattr(transformers, f"{kind}Config", None), f"{kind}ForSequenceClassification"
        if config is None or not hasattr(transformers, model):
            continue
        more = {"embedding_size": 16} if kind in ("Albert", "Electra", "MobileBert", "ConvBert") else {}
        more |= {"input_embedding_size": 16} if kind == "RemBert" else {}
        torch.manual_seed(0)
        found.append(getattr(transformers, model)(config(**small, **more)).eval())
    return found


def test_zero_token_type_ids_mean_none_to_the_models_that_take_them() -> None:
    ids = Texts().ids[:3]
    models = [model for model in zero_segments_models() if "token_type_ids" in model.forward.__code__.co_varnames]
    with torch.no_grad():
        differ = [
            type(model).__name__
            for model in models
            if not torch.equal(model(ids).logits, model(ids, token_type_ids=torch.zeros_like(ids)).logits)
        ]
    assert models
    assert differ == []


# --- transformers -------------------------------------------------------------------------------------------------


def test_transformers_own_trainer_trains_a_multi_exit_model(tmp_path: Path) -> None:
    ee = exitkit.attach(bert(), method="sdn")
    plain = transformers.Trainer(
        ee,
        arguments(tmp_path, remove_unused_columns=False),
        train_dataset=Texts(),
        eval_dataset=Texts(30),
        data_collator=lambda rows: transformers.default_data_collator(
            [{k: r[k] for k in r if k != "raw"} for r in rows]
        ),
    )
    before = plain.evaluate()["eval_loss"]
    plain.train()
    assert plain.evaluate()["eval_loss"] < before / 2
    assert standardise(ee)
    predictions = plain.predict(Texts(30)).predictions
    assert [part.shape for part in predictions] == [(30, 3)] * 3


@pytest.mark.parametrize("frozen", [True, False])
def test_exit_trainer_trains_all_exits_and_tells_their_accuracies(tmp_path: Path, frozen: bool) -> None:
    from exitkit.integrations.transformers import ExitTrainer

    ee = exitkit.attach(bert(), method="ztw")
    ee.backbone.requires_grad_(not frozen)
    weights = {name: value.clone() for name, value in ee.backbone.state_dict().items()}
    combiners = {name: value.clone() for name, value in ee.combiners.state_dict().items()}
    trainer = ExitTrainer(ee, arguments(tmp_path), train_dataset=Texts(), eval_dataset=Texts(30))
    trainer.train()
    assert standardise(ee)
    metrics = trainer.evaluate()
    outputs = exitkit.collect(ee, DataLoader(Texts(30), 10))
    accuracies = [metrics["eval_accuracy_exit_0"], metrics["eval_accuracy_exit_1"], metrics["eval_accuracy"]]
    assert accuracies == pytest.approx(outputs.accuracy().tolist(), abs=1e-6)
    assert all(torch.equal(value, weights[name]) for name, value in ee.backbone.state_dict().items()) == frozen
    assert any(not torch.equal(value, combiners[name]) for name, value in ee.combiners.state_dict().items())
    assert ee.backbone.training is False
    if not frozen:
        assert accuracies[-1] == 1


def test_exit_trainer_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    from exitkit.integrations.transformers import ExitTrainer

    with pytest.raises(ExitkitError, match=r"model is BertForSequenceClassification; give what exitkit\.attach"):
        ExitTrainer(bert(), arguments(tmp_path))
    with pytest.raises(ExitkitError, match=r"label_smoothing_factor=0\.1.*exitkit\.training\.Loss"):
        ExitTrainer(exitkit.attach(bert(), method="sdn"), arguments(tmp_path, label_smoothing_factor=0.1))


# --- Lightning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_lightning_trains_a_multi_exit_model(tmp_path: Path, loader: Any, frozen: bool) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    from exitkit.integrations.lightning import ExitModule

    ee = exitkit.attach(TinyNet().eval(), torch.randn(2, 1, 8, 8), method="ztw")
    ee.backbone.requires_grad_(not frozen)
    weights = {name: value.clone() for name, value in ee.backbone.state_dict().items()}
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    held_out = loader(50, seed=3)
    trainer.fit(ExitModule(ee, lr=1e-2), loader(), held_out)
    assert standardise(ee)
    assert all(torch.equal(value, weights[name]) for name, value in ee.backbone.state_dict().items()) == frozen
    measured = trainer.validate(ExitModule(ee), held_out, verbose=False)[0]
    outputs = exitkit.collect(ee, held_out)
    accuracies = [*(measured[f"val_accuracy_exit_{m}"] for m in range(3)), measured["val_accuracy"]]
    assert accuracies == pytest.approx(outputs.accuracy().tolist(), abs=1e-6)
    assert min(accuracies[:-1]) > 0.6


def test_lightning_without_labels_is_told_in_words() -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    from exitkit.integrations.lightning import ExitModule

    ee = exitkit.attach(TinyNet(), torch.randn(2, 1, 8, 8))
    with pytest.raises(ExitkitError, match=r"yields no labels; yield \(inputs, labels\)"):
        ExitModule(ee).validation_step(torch.randn(2, 1, 8, 8))


# --- datasets -----------------------------------------------------------------------------------------------------


def test_data_sets_of_the_datasets_library_pass_as_they_are(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from exitkit.integrations.transformers import ExitTrainer

    rows = [Texts()[row] for row in range(60)]
    columns = {
        key: [row[key].tolist() if isinstance(row[key], Tensor) else row[key] for row in rows] for key in rows[0]
    }
    data = datasets.Dataset.from_dict(columns)
    ee = exitkit.attach(bert(), method="sdn")
    exitkit.Trainer(ee, epochs=1, show_progress=False).fit(DataLoader(data.with_format("torch"), 20))
    assert len(exitkit.collect(ee, DataLoader(data.with_format("torch"), 20))) == 60
    trainer = ExitTrainer(ee, arguments(tmp_path, num_train_epochs=1), train_dataset=data, eval_dataset=data)
    trainer.train()
    assert {"eval_accuracy", "eval_accuracy_exit_0", "eval_loss"} <= trainer.evaluate().keys()
