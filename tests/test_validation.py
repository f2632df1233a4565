"""Settings that cannot work are refused before anything runs, naming the value and the fix; the others pass."""

import re

import pytest

from lrsa import validation
from lrsa.attention import flash4
from lrsa.validation import ConfigError, ConfigWarning, check_eval, check_train
from tests.test_configs import TINY, _hydra, compose_eval, compose_train  # noqa: F401


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention.scorer=newest"], r"attention: .*'newest'.*lag_relative.*random.*recency.*tova"),
        (["model.attention_backend=cudnn"], r"attention_backend='cudnn'.*reference.*gather"),
        (["data.parts.needles.source=squat"], r"data\.parts\.needles\.source='squat'.*hotpotqa.*squad"),
        (["evaluation.tasks.recall.source=jsonl"], r"evaluation\.tasks\.recall\.path: a hub name, a local folder"),
        (["+evaluation.tasks.recall.args.depth=3"], r"evaluation\.tasks\.recall: .*'depth'.*valid"),
        (["attention.keep_ratio=1.5"], r"keep_ratio=1\.5"),
        (["attention.keep_ratio=0.5", "attention.top_k=3"], r"keep_ratio=0\.5 and top_k=3"),
        (["attention.chunk_size=0"], r"chunk_size=0"),
        (["attention.keep_ratio=null", "attention.top_k=500"], r"top_k=500.*lag_size=128"),
        (["recipe.micro_batch_size=3"], r"micro_batch_size=3 does not divide recipe\.batch_size=8"),
        (["recipe.compressions=[0.5]"], r"recipe\.compressions=\[0\.5\].*below 1"),
        (["evaluation.compressions=[1,0.25]"], r"evaluation\.compressions=\[1.*0\.25\].*below 1"),
        (["evaluation.compressions=[2,2]"], r"repeats a value"),
        (
            ["recipe=dense", "recipe.compressions=[4]"],
            r"recipe\.compressions=\[4.*scorer=dense.*recipe\.compressions=\[\]",
        ),
        (["attention@evaluation.attention=dense"], r"evaluation\.attention\.scorer=dense cannot compress.*\[1\]"),
        (["trainer.precision=16-mixed"], r"trainer\.precision='16-mixed'.*32-true, bf16-mixed"),
        (["trainer.accelerator=tpu"], r"trainer\.accelerator='tpu'.*cpu"),
        (["trainer.devices=2"], r"trainer\.devices=2"),
        (["recipe.warmup_steps=900"], r"warmup_steps=900 exceeds recipe\.steps=300"),
        (["recipe.min_learning_rate=1"], r"min_learning_rate=1\.0 is above recipe\.learning_rate=0\.0001"),
        (["logger.mode=on"], r"logger\.mode='on'.*offline"),
        (["resume=nowhere"], r"resume=nowhere: no checkpoint at nowhere"),
        (["model.dtype=int8"], r"model\.dtype='int8'.*float32"),
        (["model.gguf_file=a.gguf"], r"model\.gguf_file=a\.gguf"),
        (["data.parts.needles.weight=0"], r"all weights are 0"),
        (
            ["data.parts.needles.source=prose", "+data.parts.needles.args.targets=256"],
            r"data\.parts\.needles\.args\.targets=256 must be below data\.length=256",
        ),
        (
            ["data.parts.needles.source=prose", "+data.parts.needles.args.targets=many"],
            r"data\.parts\.needles: source 'prose' has no args",
        ),
        (["evaluation.tasks.recall.source=prose"], r"recall\.source=prose asks nothing: lrsa-eval mode=perplexity"),
        (["data.parts.needles.apart=true"], r"data\.parts\.needles\.apart=true is for tasks"),
        (["evaluation.tasks.recall.apart=true"], r"tasks\.recall\.apart=true .*recall\.questions=1: raise it"),
        (["data.parts.needles.limit=5"], r"data\.parts\.needles\.limit=5 bounds tasks alone"),
        (
            ["attention=snapkv_once"],
            r"attention\.schedule=prefill_once .* row of data\.parts\.needles\.questions=8 has no one end: set",
        ),
        (
            ["evaluation.attention.schedule=prefill_once", "evaluation.tasks.recall.questions=3"],
            r"a row of evaluation\.tasks\.recall\.questions=3 has no one end",
        ),
        (["attention.schedule=prefill_once", "attention.chunk_size=8"], r"chunk_size=8 with schedule='prefill_once'"),
        (
            ["recipe=lrsa"],
            r"1 setting.*: - attention\.budget=concentrated and evaluation\.attention\.budget=concentrated leave "
            r"model\.retrieval_layers .* model\.name=recall-tiny has none: take recipe=lrsa_uniform, or name them, .*"
            r"`lrsa-eval mode=layers` .*'model\.retrieval_layers=\[\.\.\.\]'$",
        ),
        (
            ["recipe=dense", "evaluation.attention.budget=concentrated"],
            r"- evaluation\.attention\.budget=concentrated leave.* take evaluation\.attention\.budget=uniform, or name",
        ),
        (
            ["recipe=lrsa", "attention=snapkv_once", "model.retrieval_layers=[1]"],
            r"- attention: budget='concentrated' with schedule='prefill_once'.*\(.*, recipe=lrsa_uniform does not\) - ",
        ),
        (
            ["recipe=lrsa", "attention.sink_size=-1", "model.retrieval_layers=[1]"],
            r"- attention: sink_size=-1: give an integer of at least 0 - evaluation\.attention: sink_size=-1[^(]*$",
        ),
        (["model.retrieval_layers=[1,0,1]"], r"model\.retrieval_layers=\[1, 0, 1\] names a layer twice"),
        (["attention=oracle"], r"attention\.scorer=oracle looks ahead .* attention@evaluation\.attention=oracle"),
        (["attention=keydiff", "attention.budget=adaptive"], r"attention: budget='adaptive' .*'keydiff'.*snapkv, tova"),
        (
            ["attention=snapkv_adaptive", "model.attention_backend=gather"],
            r"attention_backend=gather cannot compute attention: budget='adaptive' keeps .* set it to auto",
        ),
        (
            ["attention@evaluation.attention=oracle", "model.attention_backend=flex"],
            r"attention_backend=flex cannot compute evaluation\.attention: scorer='oracle' ranks .* set it to auto",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_with_values_and_fix(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_train(compose_train(*TINY, *overrides))
    text = " ".join(str(error.value).split())
    assert re.search(message, text), text


def test_checkpoints_around_what_is_compiled_are_refused_before_anything_is_loaded(monkeypatch) -> None:
    both = [*TINY, "trainer.compile=true", "model.gradient_checkpointing=true"]
    monkeypatch.setattr(validation, "checkpoints_outside", lambda: True)
    with pytest.raises(
        ConfigError, match=r"1 setting[\s\S]*trainer\.compile=false.*model\.gradient_checkpointing=false"
    ):
        check_train(compose_train(*both))
    for way_out in ("trainer.compile=false", "model.gradient_checkpointing=false", "recipe=none"):
        check_train(compose_train(*both, way_out))
    monkeypatch.setattr(validation, "checkpoints_outside", lambda: False)
    check_train(compose_train(*both))


@pytest.mark.parametrize(("installed", "words"), [(None, "not installed"), ("4.0.0b9", "4.0.0b9, and too old")])
def test_a_backend_whose_package_is_missing_is_refused_at_once(installed, words, monkeypatch) -> None:
    monkeypatch.setattr(flash4, "_installed", lambda: installed)
    with pytest.raises(ConfigError, match=rf"attention_backend=flash4: flash-attn-4 is {words}: pip install"):
        check_train(compose_train(*TINY, "model.attention_backend=flash4"))
    monkeypatch.setattr(flash4, "_installed", lambda: "4.0.0")
    check_train(compose_train(*TINY, "model.attention_backend=flash4"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode=lm-eval"], r"mode='lm-eval' is unknown; choose one of score, generate, lm_eval, perplexity"),
        (["mode=generate", "generate.max_new_tokens=0"], r"generate\.max_new_tokens=0: tokens, at least 1, or null"),
        (
            ["attention@evaluation.attention=snapkv_once", "evaluation.tasks.squad.questions=2"],
            r"row of evaluation\.tasks\.squad\.questions=2 has no one end",
        ),
        (
            ["mode=lm_eval", "lm_eval.tasks=[x]", "evaluation.attention.schedule=prefill_once"],
            r"schedule=prefill_once does not work with mode=lm_eval.*mode=generate",
        ),
        (["mode=generate", "generate.block_size=-1"], r"generate\.block_size=-1"),
        (["mode=lm_eval"], r"lm_eval\.tasks is empty"),
        (["mode=perplexity", "perplexity.windows=1"], r"perplexity\.windows=1: at least 2"),
        (["mode=perplexity", "perplexity.buckets=0"], r"perplexity\.buckets=0: .* at least 1"),
        (
            ["mode=perplexity", "perplexity.buckets=300", "evaluation.length=512"],
            r"perplexity\.buckets=300 of evaluation\.length=512 tokens are shorter than 2",
        ),
        (
            ["mode=perplexity", "attention@evaluation.attention=snapkv_once"],
            r"schedule=prefill_once does not work with mode=perplexity.*use schedule=chunked",
        ),
        (
            ["mode=perplexity", "attention@evaluation.attention=oracle"],
            r"scorer=oracle looks ahead, .* choose another for mode=perplexity",
        ),
        (
            ["mode=generate", "attention@evaluation.attention=oracle"],
            r"mode=generate needs a cache, which cannot hold evaluation\.attention: scorer='oracle' .* use mode=score",
        ),
        (
            ["mode=lm_eval", "lm_eval.tasks=[x]", "attention@evaluation.attention=snapkv_adaptive"],
            r"mode=lm_eval needs a cache, which cannot hold evaluation\.attention: budget='adaptive' .* use mode=score",
        ),
        (["mode=layers", "layers.count=0"], r"layers\.count=0: layers to rank, at least 1"),
        (["mode=layers", "task=[]"], r"evaluation\.tasks is empty: mode=layers scores their references"),
        (["mode=layers", "attention@evaluation.attention=dense"], r"scorer=dense: every layer is dense, .* choose a"),
        (
            ["mode=layers", "attention@evaluation.attention=snapkv_once"],
            r"schedule=prefill_once does not work with mode=layers.*use schedule=chunked",
        ),
        (
            ["mode=layers", "evaluation.attention.budget=pyramid"],
            r"budget=pyramid does not work with mode=layers.*use budget=uniform",
        ),
        (
            ["mode=layers", "attention@evaluation.attention=recency"],
            r"equal_bytes_at=4096 widens the window .* set equal_bytes_at=null",
        ),
        (
            ["mode=layers", "evaluation.attention.keep_ratio=null", "evaluation.attention.top_k=128"],
            r"keep_ratio=None, top_k=128 keeps all 128 tokens of a partition: .* lower it",
        ),
        (["mode=lm_eval", "lm_eval.tasks=[x]", "lm_eval.include_path=/nowhere"], r"include_path=/nowhere is no folder"),
        (["mode=lm_eval", "lm_eval.tasks=[x]", "lm_eval.limit=0"], r"lm_eval\.limit=0: at least 1"),
        (["mode=lm_eval", "lm_eval.tasks=[x]", "lm_eval.gen_kwargs=5"], r"lm_eval\.gen_kwargs=5 is not a mapping"),
        (
            ["mode=lm_eval", "lm_eval.tasks=[x]", "lm_eval.limit=9", "lm_eval.metadata={max_seq_lengths: [512, 1024]}"],
            r"lm_eval\.limit=9 takes .* the first of lm_eval\.metadata\.max_seq_lengths=\[512, 1024\]: .*lrsa-eval -m",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_evaluations_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_eval(compose_eval("model=recall_tiny", "trainer=cpu", *overrides))
    text = " ".join(str(error.value).split())
    assert re.search(message, text), text


def test_every_mode_passes() -> None:
    modes = (
        ["mode=score"],
        ["mode=generate"],
        ["mode=perplexity"],
        ["mode=selection", "evaluation.compressions=[4]"],
        ["mode=layers", "evaluation.compressions=[1]"],
        ["mode=lm_eval", "lm_eval.tasks=[niah_single_1]"],
    )
    for overrides in modes:
        conf = compose_eval("model=recall_tiny", "trainer=cpu", *overrides, "evaluation.length=512")
        check_eval(conf)
    check_eval(compose_eval("mode=generate", "attention@evaluation.attention=oracle", "evaluation.compressions=[1]"))
    conf = compose_eval(*overrides, "lm_eval.limit=9", "lm_eval.metadata={max_seq_lengths: [4096]}", "trainer=cpu")
    check_eval(conf)
    assert conf.lm_eval.metadata == {"max_seq_lengths": [4096]}


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match="3 setting") as error:
        check_train(
            compose_train(*TINY, "recipe.steps=0", "recipe.warmup_steps=0", "recipe.batch_size=0", "data.length=1")
        )
    for name in ("recipe.steps=0", "recipe.batch_size=0", "data.length=1"):
        assert name in str(error.value)


def test_samples_too_short_to_compress_warn() -> None:
    conf = compose_train(*TINY)
    with pytest.warns(ConfigWarning, match=r"data\.length=256 never compresses: .*16 \+ 2 \* 128 = 272"):
        check_train(conf)
    with pytest.warns(ConfigWarning, match=r"evaluation\.length=200"):
        check_eval(compose_eval(*TINY[:3], "task=[recall]", "evaluation.length=200"))
    with pytest.warns(ConfigWarning, match=r"evaluation\.length=200 never compresses"):  # which reads no compressions
        check_eval(compose_eval("mode=layers", "task=[recall]", "evaluation.length=200", "evaluation.compressions=[1]"))


def test_a_budget_that_is_trained_and_not_tested_warns(recwarn: pytest.WarningsRecorder) -> None:
    spared = [*TINY, "recipe=lrsa", "model.retrieval_layers=[1]", "data.length=512", "evaluation.length=512"]
    unlike = r"budget=uniform with dense_layers=\[1\] in training, but evaluation\.attention\.budget=concentrated"
    with pytest.warns(ConfigWarning, match=unlike):
        check_train(compose_train(*spared, "attention.budget=uniform"))
    recwarn.clear()
    for fine in (
        [],
        ["recipe=dense"],
        ["recipe=lrsa_uniform"],
        ["attention.budget=uniform", "recipe.compressions=[1]"],
    ):
        check_train(compose_train(*spared, *fine))
    assert not recwarn.list


def test_a_compression_that_keeps_nothing_warns() -> None:
    with pytest.warns(ConfigWarning, match=r"\[16\.0\] keep nothing"):
        check_train(compose_train(*TINY, "attention.lag_size=8"))
