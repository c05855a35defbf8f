"""Chat templates of every habit: used where they can be, and refused in one line that names the cure where they cannot."""

import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

import moa_lab as ml
from moa_lab.calibration import Request, calibrate
from moa_lab.calibration.prompts import Turn, assemble, chat_frame, encode
from moa_lab.calibration.tasks import PlainText, Questions, Summaries
from moa_lab.evaluate.harness import harness
from moa_lab.evaluate.testsets import line_samples, needle_samples
from moa_lab.interface import attention_sites
from moa_lab.models import chat_ids
from moa_lab.prompting.rendering import CURE, check_turns

LOOP = "{% for m in messages %}{BODY}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{TEXT}<|im_end|>\n"


def template(text: str = "{{ m.content }}", body: str = "{TURN}") -> str:
    return LOOP.replace("{BODY}", body).replace("{TURN}", TURN).replace("{TEXT}", text)


USABLE = {
    "list content only": template("{% for part in m.content %}{{ part.text }}{% endfor %}"),
    "list content, strings raise": template(
        "{% if m.content is string %}{{ raise_exception('no strings') }}{% endif %}{{ m.content[0]['text'] }}"
    ),
    "strips": template("{{ m.content | trim }}"),
    "uppercase": template("{{ m.content | upper }}"),
    "no system role": template(body="{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{TURN}"),
    "alternating": template(
        body="{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{TURN}"
    ),
    "no last answer": template(body="{% if not (loop.last and m.role == 'assistant') %}{TURN}{% endif %}"),
    "last answer raises": template(body="{% if loop.last and m.role == 'assistant' %}{{ raise_exception('User last') }}{% endif %}{TURN}"),
}
BROKEN = {
    "raises": ("{{ raise_exception('use the other processor') }}", "raises TemplateError: use the other processor"),
    "is no jinja": ("{% for m in %}", "raises TemplateSyntaxError"),
    "has a bug": ("{{ messages[0]['content'] + 1 }}", "raises TypeError"),
    "reads what is not there": ("{{ messages[0].name.first }}", "raises UndefinedError"),
    "drops all": ("<|im_start|>", r"drops message 1 \(user\) of 4"),
    "drops history": (template(body="{% if loop.revindex <= 2 %}{TURN}{% endif %}"), r"drops message 1 \(user\) of 4"),
    "drops questions": (template(body="{% if m.role == 'assistant' %}{TURN}{% endif %}"), r"drops message 1 \(user\) of 4"),
    "drops answers": (template(body="{% if m.role == 'user' %}{TURN}{% endif %}"), r"drops message 2 \(assistant\) of 4"),
    "reorders": (template().replace("in messages", "in messages | reverse"), "changes the order of the messages"),
    "repeats": (template("{{ m.content }}{{ m.content }}"), r"repeats message 1 \(user\)"),
}


def tokenizer_with(chat_template: str) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(chat_template)


@pytest.mark.parametrize("name", USABLE)
def test_a_frame_finds_the_way_that_a_template_takes_messages(name: str) -> None:
    tokenizer = tokenizer_with(USABLE[name])
    check_turns(tokenizer, 2)
    frame = chat_frame(tokenizer, "Read.\n\n", [Turn("Who?", "It is"), Turn("When?")])
    text = tokenizer.decode(assemble(frame, encode(tokenizer, "context"), [encode(tokenizer, " A"), encode(tokenizer, "B")])[0])
    asked = ("READ.", "WHO?", "WHEN?") if name == "uppercase" else ("Read.", "Who?", "When?")
    assert text == (
        f"<|im_start|>user\n{asked[0]}\n\ncontext\n\n{asked[1]}<|im_end|>\n<|im_start|>assistant\nIt is A<|im_end|>\n"
        f"<|im_start|>user\n{asked[2]}<|im_end|>\n<|im_start|>assistant\nB"
    )


@pytest.mark.parametrize("name", BROKEN)
def test_a_frame_names_what_a_template_does_and_the_cure(name: str) -> None:
    chat_template, words = BROKEN[name]
    with pytest.raises(ValueError, match=words) as refusal:
        chat_frame(tokenizer_with(chat_template), "", [Turn("Who?"), Turn("When?")])
    assert str(refusal.value).endswith(CURE)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=words):
        check_turns(tokenizer_with(chat_template), 2)


def test_one_question_works_with_a_template_that_drops_history() -> None:
    tokenizer = tokenizer_with(BROKEN["drops history"][0])
    assert chat_frame(tokenizer, "", [Turn("Who?")]) == chat_frame(tiny_tokenizer(), "", [Turn("Who?")])


def test_list_content_is_what_string_content_is() -> None:
    messages = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Bye"}]
    for name in ("list content only", "list content, strings raise", "strips"):
        assert chat_ids(tokenizer_with(USABLE[name]), messages) == chat_ids(tiny_tokenizer(), messages)


@pytest.mark.parametrize("name", ["raises", "is no jinja", "has a bug", "drops all", "drops questions"])
def test_a_chat_that_a_template_cannot_hold_is_refused(name: str) -> None:
    tokenizer = tokenizer_with(BROKEN[name][0])
    with pytest.raises(ValueError, match=r"the chat template (raises|drops)"):
        chat_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    with pytest.raises(ValueError, match=r"the chat template (raises|drops)"):
        ml.generate(tiny_model("llama"), tokenizer, "Hi", chat=True)


def test_a_chat_whose_history_would_be_lost_is_refused() -> None:
    messages = [{"role": "user", "content": "My name is Ada"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Who?"}]
    tokenizer = tokenizer_with(BROKEN["drops history"][0])
    with pytest.raises(ValueError, match=r"drops message 1 \(user\) of 3"):
        chat_ids(tokenizer, messages)
    assert chat_ids(tokenizer, messages[2:])


def test_a_system_message_that_a_template_forbids_is_refused() -> None:
    with pytest.raises(ValueError, match="raises TemplateError: System role not supported"):
        chat_ids(tokenizer_with(USABLE["no system role"]), [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])


def test_calibration_asks_the_template_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama", max_length=1024), tokenizer_with(BROKEN["drops history"][0])

    def no_forward(*_: object, **__: object) -> None:
        pytest.fail("the model was asked")

    # Eight tokens tell whether plans apply at all; what follows must not ask.
    attention_sites(model)
    monkeypatch.setattr(model, "forward", no_forward)
    # Summaries come first and have one turn each; the questions behind them have two.
    wanted = (Request(Summaries(answer_tokens=4), 1), Request(Questions(per_sample=2), 1))
    with pytest.raises(ValueError, match="drops message 1"):
        calibrate(model, tokenizer, [700], wanted=wanted)
    assert len(calibrate(model, tokenizer_with(BROKEN["raises"][0]), [700], wanted=(Request(PlainText(), 1),))) == 1


def test_test_samples_and_the_harness_refuse_a_template_in_words() -> None:
    tokenizer = tokenizer_with(BROKEN["raises"][0])
    for make in (needle_samples, line_samples):
        with pytest.raises(ValueError, match=r"raises TemplateError.*--plain-prompts"):
            make(tokenizer, 900, 1)
    model = tiny_model("llama")
    for chat_template in (BROKEN["raises"][0], USABLE["list content only"], None):
        with pytest.raises(ValueError, match=r"chat_template: .*; leave the option out|chat_template: .* has none"):
            harness(model, tiny_tokenizer(chat_template), None, ["any"], chat_template=True)


def test_the_cure_works(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tokenizer_with(BROKEN["raises"][0]).save_pretrained(folder)
    _, tokenizer = ml.load_model(str(folder), dtype=torch.float32)
    with pytest.raises(ValueError, match="--plain-prompts"):
        check_turns(tokenizer)
    _, tokenizer = ml.load_model(str(folder), dtype=torch.float32, plain_prompts=True)
    check_turns(tokenizer, 2)
    assert tokenizer.decode(chat_frame(tokenizer, "", [Turn("Who?")]).before[0]) == "\n\nWho?\n\nAnswer: "


def test_the_usual_template_is_asked_as_it_always_was() -> None:
    messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE)
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert chat_ids(tokenizer, messages) == list(expected)
