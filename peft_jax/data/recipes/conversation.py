"""Recipe for conversations (messages, or prompt and completion), rendered by a chat template."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from peft_jax.core import did_you_mean
from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Conversation
from peft_jax.data.recipes.base import Recipe
from peft_jax.data.rows import Row
from peft_jax.data.templates import without_nulls

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
"""Roles of chat templates, by their names in data (including ShareGPT's)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Recipe):
    """A row's messages, with all of the assistant's turns in the loss.

    A row has "messages" with "role" and "content", or "conversations" with "from" and "value", or
    "prompt" and "completion", each a text or a list of messages. Of the latter, only the completion
    is in the loss. A turn of the assistant with "weight" 0 is not in the loss. The first column
    that is not null is read. A column "system" gives the system turn.
    """

    templated: ClassVar[bool] = False
    makes_conversations: ClassVar[bool] = True

    def example(self, row: Row) -> Conversation:
        """Returns the row's conversation.

        Raises:
          BadRowError: The row has none of these forms, or no assistant's turn is in the loss.
        """
        messages = self.read_value(row, "messages")
        context = 0
        if messages is None:
            prompt, completion = self.read_value(row, "prompt"), self.read_value(row, "completion")
            if prompt is None or completion is None:
                raise BadRowError(
                    "missing field",
                    "no 'messages', and not both 'prompt' and 'completion'"
                    f"{did_you_mean('messages', row)}",
                )
            before = _turns(prompt, "user")
            context = len(before)
            messages = [*before, *_turns(completion, "assistant")]
        tools = self.read_value(row, "tools") or ()
        if not _is_list_of_objects(tools):
            raise BadRowError("wrong type", "field 'tools' must be a list of objects")
        # Arrow fills the keys that other rows have with nulls.
        listed = without_nulls(_listed(messages))
        weights = [_weight(number, message) for number, message in enumerate(listed)]
        checked = [_message(number, message) for number, message in enumerate(listed)]
        loss_turns = tuple(
            number
            for number, message in enumerate(checked)
            if message["role"] == "assistant" and number >= context and weights[number]
        )
        if not loss_turns:
            raise BadRowError("empty", "the assistant has no text in the loss")
        system = self.read_text(row, "system")
        if system.strip():
            if checked[0]["role"] == "system" and checked[0]["content"] != system:
                raise BadRowError(
                    "two system texts", "the conversation's differs from column 'system'"
                )
            if checked[0]["role"] != "system":
                checked.insert(0, {"role": "system", "content": system})
                loss_turns = tuple(number + 1 for number in loss_turns)
        return Conversation(
            messages=tuple(checked), tools=tuple(without_nulls(tools)), loss_turns=loss_turns
        )


def _turns(value: Any, role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _listed(value)


def _listed(messages: Any) -> list[Any]:
    if not _is_list_of_objects(messages):
        raise BadRowError(
            "wrong type", f"messages must be a list of objects, not a {type(messages).__name__}"
        )
    if not messages:
        raise BadRowError("empty", "there are no messages")
    return list(messages)


def _is_list_of_objects(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(isinstance(item, Mapping) for item in value)


def _weight(number: int, message: Mapping[str, Any]) -> bool:
    """Returns whether a message is in the loss, if it is the assistant's."""
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise BadRowError(
            "wrong type",
            f"message {number + 1} has weight {weight!r}; it must be 1 (in the loss) or 0",
        )
    return bool(weight)


def _message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message with the names that chat templates use."""
    fields = {key: value for key, value in message.items() if key != "weight"}
    if "from" in fields and "role" not in fields:
        fields["role"] = fields.pop("from")
        fields["content"] = fields.pop("value", "")
    role = fields.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRowError(
            "unknown role",
            f"message {number + 1} has role {role!r}{did_you_mean(str(role), _ROLES)}",
        )
    content = fields.setdefault("content", "")
    if not isinstance(content, str):
        raise BadRowError(
            "wrong type",
            f"message {number + 1} has a {type(content).__name__} as content, but needs text",
        )
    if not content.strip() and role in ("user", "assistant") and not fields.get("tool_calls"):
        raise BadRowError("empty", f"message {number + 1} ({role}) has no content")
    return {**fields, "role": _ROLES[role]}


CHAT = Chat(
    name="chat",
    about="conversations through a chat template, the assistant's turns in the loss",
    fields={
        "messages": ("messages", "conversations", "conversation"),
        "prompt": ("prompt",),
        "completion": ("completion", "response"),
        "tools": ("tools",),
        "system": ("system",),
    },
    optional=("messages", "prompt", "completion", "tools", "system"),
)
