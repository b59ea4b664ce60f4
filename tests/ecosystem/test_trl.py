"""TRL's SFTTrainer: conversations by a chat template, padded and packed, each variant beside Llama."""

import itertools
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch
from support.ecosystem import MODELS, small, tool
from support.small_folders import small_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from diffattn.model.loading import load

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ANSWERED = TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}",
)


@pytest.fixture
def trl() -> ModuleType:
    return tool("trl")


def tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    made = small_tokenizer(300)
    made.chat_template = template
    return made


def conversations() -> datasets.Dataset:
    """Of three lengths, so that rows are padded, and packed rows hold several."""
    said = [("new lower " * (1 + number % 3), "wide low") for number in range(24)]
    return datasets.Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
            for asked, answer in said
        ]
    )


def trainer(trl: ModuleType, kind: str, folder: Path, template: str = TEMPLATE, **settings):
    """A trainer of a few steps."""
    given = {
        "max_length": 64, "per_device_train_batch_size": 2, "max_steps": 8, "learning_rate": 3e-3, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    return trl.SFTTrainer(
        model=small(kind), args=trl.SFTConfig(output_dir=str(folder), **given | settings),
        train_dataset=conversations(), processing_class=tokenizer(template),
    )  # fmt: skip


def losses(trained) -> list[float]:
    return [row["loss"] for row in trained.state.log_history if "loss" in row]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", MODELS)
def test_conversations_are_learned(kind: str, packing: bool, trl: ModuleType, tmp_path: Path) -> None:
    made = trainer(trl, kind, tmp_path, packing=packing)
    made.train()
    assert losses(made)[-1] < losses(made)[0] - 2
    made.save_model(str(tmp_path / "model"))
    model, its_tokenizer = load(tmp_path / "model")
    assert type(model) is type(small(kind))
    assert its_tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("kind", MODELS)
def test_conversations_of_one_packed_row_do_not_see_each_other(kind: str, trl: ModuleType, tmp_path: Path) -> None:
    made = trainer(trl, kind, tmp_path, packing=True)
    row = next(iter(made.get_train_dataloader()))
    starts = row["cu_seq_lens_q"].tolist()
    assert len(starts) > 3
    with torch.no_grad():
        model = made.model.eval()
        packed = model(**{name: value for name, value in row.items() if name != "labels"}).logits
        for start, end in itertools.pairwise(starts):
            alone = model(row["input_ids"][:, start:end]).logits
            torch.testing.assert_close(packed[:, start:end], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_only_answers_have_labels_where_the_template_marks_them(kind: str, trl: ModuleType, tmp_path: Path) -> None:
    made = trainer(trl, kind, tmp_path, ANSWERED, assistant_only_loss=True, max_steps=2)
    row = next(iter(made.get_train_dataloader()))
    kept = row["labels"][0][row["labels"][0] >= 0]
    assert made.processing_class.decode(kept).strip() == "wide low"
    made.train()
    assert all(loss > 0 for loss in losses(made))


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_is_trained_by_its_trainer(kind: str, trl: ModuleType, tmp_path: Path) -> None:
    peft = tool("peft")
    small(kind).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    made = trl.SFTTrainer(
        model=str(tmp_path / "base"),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "run"), max_steps=6, learning_rate=0.02, logging_steps=1, report_to=[],
            use_cpu=True, bf16=False, disable_tqdm=True, packing=True, max_length=64, save_strategy="no",
        ),
        train_dataset=conversations(), processing_class=tokenizer(), peft_config=peft.LoraConfig(task_type="CAUSAL_LM"),
    )  # fmt: skip
    made.train()
    assert losses(made)[-1] < losses(made)[0] - 0.5
    made.save_model(str(tmp_path / "adapter"))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    assert type(again) is type(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
