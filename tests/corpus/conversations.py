"""Conversations and chat templates."""

from __future__ import annotations

from pathlib import Path

from tests.corpus.cases import Made, case, copied, lines, options

TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
REFUSING = "{{ raise_exception('System role not supported') }}"


def _with(base: Path, folder: Path, template: str | None, row: dict, *more: str) -> Made:
    model = copied(base, folder)
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    return [*options(model, lines(folder / "p.jsonl", [row])), *more]


@case(prompts=["<bos>[system]be brief[user]hello[assistant]"], expected=["hi"])
def messages(base: Path, folder: Path) -> Made:
    return _with(base, folder, TEMPLATE, {"messages": TALK, "answer": "hi"})


@case(prompts=["<bos>[system]be brief[user]hello[assistant]"], expected=["hi"])
def messages_with_their_answer(base: Path, folder: Path) -> Made:
    return _with(base, folder, TEMPLATE, {"messages": [*TALK, {"role": "assistant", "content": "hi"}]})


@case(prompts=["<bos>[system]be brief[user]hello[assistant]"], expected=["hi"])
def messages_as_the_prompt(base: Path, folder: Path) -> Made:
    return _with(base, folder, TEMPLATE, {"prompt": TALK, "answer": "hi"})


@case(prompts=["<bos>[user]hello[assistant]"], expected=["hi"])
def messages_of_sharegpt(base: Path, folder: Path) -> Made:
    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    return _with(base, folder, TEMPLATE, {"conversations": talk})


@case(prompts=["<bos>[user]hello[assistant]"], expected=["hi"])
def messages_in_parts(base: Path, folder: Path) -> Made:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    return _with(base, folder, TEMPLATE, {"messages": [{"role": "user", "content": parts}], "answer": "hi"})


@case("must contain only text")
def messages_with_an_image(base: Path, folder: Path) -> Made:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}]
    return _with(base, folder, TEMPLATE, {"messages": [{"role": "user", "content": parts}], "answer": "hi"})


@case("has none")
def messages_without_a_template(base: Path, folder: Path) -> Made:
    return _with(base, folder, None, {"messages": TALK, "answer": "hi"})


@case("role and content")
def messages_without_roles(base: Path, folder: Path) -> Made:
    return _with(base, folder, TEMPLATE, {"messages": [{"text": "hello"}], "answer": "hi"})


@case("answer must be")
def messages_without_an_answer(base: Path, folder: Path) -> Made:
    return _with(base, folder, TEMPLATE, {"messages": TALK})


@case("System role not supported")
def template_that_refuses(base: Path, folder: Path) -> Made:
    return _with(base, folder, REFUSING, {"messages": TALK, "answer": "hi"})


@case("chat template")
def template_that_is_broken(base: Path, folder: Path) -> Made:
    return _with(base, folder, "{% for m in messages %}", {"messages": TALK, "answer": "hi"})


@case(prompts=["<bos>[user]hello[assistant]"], expected=["hi"])
def chat_around_a_plain_prompt(base: Path, folder: Path) -> Made:
    return _with(base, folder, TEMPLATE, {"prompt": "hello", "answer": "hi"}, "--chat")


@case(prompts=["<bos>[user]Keys. Which?[assistant]It is"], expected=["12"])
def chat_around_ruler(base: Path, folder: Path) -> Made:
    row = {"input": "Keys. Which?", "outputs": ["12"], "answer_prefix": " It is"}
    return _with(base, folder, TEMPLATE, row, "--chat")


@case("has none")
def chat_without_a_template(base: Path, folder: Path) -> Made:
    return _with(base, folder, None, {"prompt": "hello", "answer": "hi"}, "--chat")
