"""README.md beside an adapter and a merged model."""

from __future__ import annotations

from pathlib import Path

from command_line import STEPS, Given, Run, call
from huggingface_hub import ModelCard

pytest_plugins = ("cli_fixtures",)


def test_cards_say_where_a_result_comes_from(given: Given, plain: Run, tmp_path: Path) -> None:
    merged, adapter, earlier = (tmp_path / name for name in ("merged", "adapter", "earlier"))
    assert call("export", "--run", plain.path, "--merged", merged, "--adapter", adapter) == 0
    assert call("replay", plain.path, "--to-step", 4, "--merged", earlier) == 0
    own = (plain.path / "adapter" / "README.md").read_text()
    assert own == (adapter / "README.md").read_text()
    for folder, library, steps in (
        (adapter, "peft", STEPS),
        (merged, "transformers", STEPS),
        (earlier, "transformers", 4),
    ):
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model == str(given.model)
        assert card.data.library_name == library and "zeroth-order" in card.data.tags
        assert f"| steps | {steps} |" in card.text
        for row in ("| method | tezo |", "| seed | 3 |", f"| task | {given.data} |"):
            assert row in card.text
        scores = {line["step"]: line for line in plain.lines if "test_accuracy" in line}
        accuracy = f"{scores[steps]['test_accuracy']:.1%} of {scores[steps]['test_examples']} test"
        assert accuracy in card.text and f"{scores[0]['test_accuracy']:.1%} before" in card.text
