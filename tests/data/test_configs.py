"""The YAML files of `conf/data` and `conf/task`: each fits its schema and names arguments that its source knows."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lrsa.config import DataConf, ExamplesConf
from lrsa.data import SampleSet
from lrsa.data.sources import source_args

CONF = Path(__file__).resolve().parents[2] / "conf"
DATA = sorted(CONF.glob("data/*.yaml"))
TASKS = sorted(file for file in CONF.glob("task/*.yaml") if "defaults" not in OmegaConf.load(file))  # no groups


def read(schema: type, file: Path):
    return OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(file))


@pytest.mark.parametrize("file", DATA, ids=lambda file: file.stem)
def test_data_configs(file) -> None:
    conf = read(DataConf, file)
    assert conf.parts
    for part in conf.parts.values():
        source_args(part if not OmegaConf.is_missing(part, "path") else ExamplesConf(source=part.source))


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_task_configs(file) -> None:
    conf = read(ExamplesConf, file)
    source_args(OmegaConf.to_object(conf))
    assert conf.questions == 1, "one question a context in evaluation"


def test_the_demo_trains_and_scores_the_same_task(words_tokenizer) -> None:
    data = OmegaConf.to_object(read(DataConf, CONF / "data" / "demo_recall.yaml"))
    task = OmegaConf.to_object(read(ExamplesConf, CONF / "task" / "recall.yaml"))
    part = data.parts["needles"]
    assert source_args(part) == source_args(task)
    for conf in (part, task):
        sample = SampleSet(conf, words_tokenizer, data.length, stream="train/needles/0")[0]
        assert sample.length == data.length and words_tokenizer.unk_token_id not in sample.input_ids


@pytest.mark.parametrize(
    "file", [CONF / "data" / "smollm2_mix.yaml", CONF / "task" / "needles.yaml"], ids=lambda f: f.stem
)
def test_training_and_evaluation_recall_ask_for_the_same(file) -> None:
    conf = OmegaConf.load(file)
    args = (conf.parts.needles if "parts" in conf else conf).args
    assert args == {"needles": 24, "value_digits": 7}
