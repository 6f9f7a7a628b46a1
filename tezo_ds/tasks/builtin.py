"""Built-in tasks: prompts in our own words for data sets that papers of this field use; see docs/tasks.md."""

from __future__ import annotations

from tezo_ds.tasks.spec import TaskSpec

_SPECS = (
    TaskSpec(
        name="trec",
        template="Question: {text}\n"
        "Answer type (abbreviation, description, thing, person, place or number):",
        verbalizers={
            "ABBR": "abbreviation",
            "DESC": "description",
            "ENTY": "thing",
            "HUM": "person",
            "LOC": "place",
            "NUM": "number",
        },
        hub_id="CogComp/trec",
        # The main branch is a loading script, which datasets >= 4 refuses to run.
        hub_revision="refs/convert/parquet",
        hub_label_field="coarse_label",
    ),
    TaskSpec(
        name="rotten-tomatoes",
        template="{text} It was",
        verbalizers={"neg": "terrible", "pos": "great"},
        hub_id="cornell-movie-review-data/rotten_tomatoes",
    ),
    TaskSpec(
        name="sst2",
        template="{sentence} It was",
        verbalizers={"negative": "terrible", "positive": "great"},
        hub_id="nyu-mll/glue",
        hub_config="sst2",
        test_split="validation",  # GLUE's and SuperGLUE's test labels are not public
    ),
    TaskSpec(
        name="sst5",
        template="{text} It was",
        verbalizers={
            "very negative": "terrible",
            "negative": "bad",
            "neutral": "okay",
            "positive": "good",
            "very positive": "great",
        },
        label_field="label_text",
        hub_id="SetFit/sst5",
    ),
    TaskSpec(
        name="snli",
        template='{premise}\nDoes it follow that "{hypothesis}"? Yes, Maybe or No?\nAnswer:',
        verbalizers={"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"},
        hub_id="stanfordnlp/snli",
    ),
    TaskSpec(
        name="mnli",
        template='{premise}\nDoes it follow that "{hypothesis}"? Yes, Maybe or No?\nAnswer:',
        verbalizers={"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"},
        hub_id="nyu-mll/glue",
        hub_config="mnli",
        test_split="validation_matched",
    ),
    TaskSpec(
        name="qnli",
        template='{sentence}\nDoes this answer the question "{question}"? Yes or No?\nAnswer:',
        verbalizers={"entailment": "Yes", "not_entailment": "No"},
        hub_id="nyu-mll/glue",
        hub_config="qnli",
        test_split="validation",
    ),
    TaskSpec(
        name="wic",
        template='{sentence1}\n{sentence2}\nDoes "{word}" mean the same in both? Yes or No?\nAnswer:',
        verbalizers={"True": "Yes", "False": "No"},
        hub_id="aps/super_glue",
        hub_config="wic",
        test_split="validation",
    ),
    TaskSpec(
        name="wsc",
        template='{text}\nIs "{span2_text}" here {span1_text}? Yes or No?\nAnswer:',
        verbalizers={"True": "Yes", "False": "No"},
        hub_id="aps/super_glue",
        hub_config="wsc.fixed",
        test_split="validation",
    ),
    TaskSpec(
        name="multirc",
        template="{paragraph}\nQuestion: {question}\nAnswer: {answer}\nIs this answer right? Yes or No?",
        verbalizers={"True": "Yes", "False": "No"},
        hub_id="aps/super_glue",
        hub_config="multirc",
        test_split="validation",
    ),
    TaskSpec(
        name="copa",
        template="{start}",
        choices_field="choices",
        hub_id="aps/super_glue",
        hub_config="copa",
        test_split="validation",
    ),
    TaskSpec(
        name="record",
        template="{passage}\n-",
        choices_field="choices",
        hub_id="aps/super_glue",
        hub_config="record",
        test_split="validation",
    ),
    TaskSpec(
        name="squad",
        template="Title: {title}\n{context}\nQuestion: {question}\nAnswer:",
        answer_field="answer",
        hub_id="rajpurkar/squad",
        test_split="validation",
    ),
    TaskSpec(
        name="drop",
        template="{passage}\nQuestion: {question}\nAnswer:",
        answer_field="answer",
        hub_id="ucinlp/drop",
        test_split="validation",
    ),
    TaskSpec(
        name="boolq",
        template="{passage}\nQuestion: {question}?\nAnswer (Yes or No):",
        verbalizers={"True": "Yes", "False": "No"},
        hub_id="google/boolq",
        hub_label_field="answer",
        test_split="validation",
    ),
    TaskSpec(
        name="rte",
        template='{premise}\nDoes it follow that "{hypothesis}"? Yes or No?\nAnswer:',
        verbalizers={"entailment": "Yes", "not_entailment": "No"},
        hub_id="aps/super_glue",
        hub_config="rte",
        test_split="validation",
    ),
    TaskSpec(
        name="cb",
        template='{premise}\nDoes it follow that "{hypothesis}"? Yes, No or Maybe?\nAnswer:',
        verbalizers={"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
        hub_id="aps/super_glue",
        hub_config="cb",
        test_split="validation",
    ),
)

BUILTIN_TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in _SPECS}
