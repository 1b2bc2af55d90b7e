"""Messages into the text a model was trained to continue, by its own chat template.

The template is a Jinja program that came with the model. It runs in Jinja's immutable sandbox with
the names that transformers gives it, so that a device renders what the trainer rendered.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge.errors import UserError

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise when it runs: it is a program, and may add a number to a word."""


class ChatError(UserError):
    """A conversation cannot be rendered by the model's chat template."""


def render_chat(
    template: str, messages: Sequence[Message], special_tokens: Mapping[str, str]
) -> str:
    """Return the text of ``messages`` up to where the assistant's answer begins.

    Args:
        template: The model's Jinja template.
        messages: The conversation, its last message from the user.
        special_tokens: `bos_token` and `eos_token`, as templates name them.

    Raises:
        ChatError: The template refuses the conversation, fails, or is not a Jinja program.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **special_tokens,
        )
    except jinja2.TemplateError as error:
        raise ChatError(f"the model's chat template refuses the conversation: {error}") from None
    except TEMPLATE_ERRORS as error:
        raise ChatError(
            f"the model's chat template fails on the conversation ({type(error).__name__}: "
            f"{error}): mend the template and build again"
        ) from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML characters, which transformers' does not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now(tz=datetime.UTC).astimezone().strftime(form)
