"""A conversation: messages in order, how they are edited, and how they are saved."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from plans.errors import InputError, UsageError
from plans.reading.files import write_text
from plans.reading.strict import SchemaVersion, StrictModel

MAX_SAVED_BYTES = 64 << 20

Role = Literal["system", "user", "assistant"]


class SavedMessage(StrictModel):
    """One message of a saved conversation."""

    role: Role
    content: str


class SavedConversation(StrictModel):
    """What `/save` writes: a system message or none, then user and assistant in turns."""

    schema_version: SchemaVersion = 1
    kind: Literal["conversation"] = "conversation"
    messages: Annotated[tuple[SavedMessage, ...], Field(max_length=1_000_000)]

    @model_validator(mode="after")
    def _takes_turns(self) -> "SavedConversation":
        roles = [message.role for message in self.messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        expected = ["user", "assistant"] * (len(turns) // 2)
        if turns != expected:
            raise ValueError("messages are not a system message or none, then questions with their answers")
        return self


@dataclass(slots=True)
class Conversation:
    """Messages that can be edited from the end.

    Attributes:
        system: the system message; empty for none.
        turns: user messages and answers, alternating; while an answer is made, the last one is the user's.
    """

    system: str = ""
    turns: list[str] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages as chat templates want them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        roles = ("user", "assistant")
        return system + [{"role": roles[i % 2], "content": text} for i, text in enumerate(self.turns)]

    @property
    def last_message(self) -> str:
        """The last user message.

        Raises:
            UsageError: there is none.
        """
        if not self.turns:
            raise UsageError("there is no message yet", hint="write one", code="E-CHAT")
        return self.turns[(len(self.turns) - 1) // 2 * 2]

    def undo(self) -> str:
        """Take back the last user message with its answer, and return it.

        Raises:
            UsageError: there is none.
        """
        message = self.last_message
        del self.turns[(len(self.turns) - 1) // 2 * 2 :]
        return message

    def save(self, path: Path) -> None:
        """Write the conversation; an existing file is replaced only if it is a saved conversation.

        Raises:
            InputError: the file exists and is something else.
            MachineError: it cannot be written.
        """
        if path.exists():
            read_conversation(path)
        messages = tuple(SavedMessage.model_validate(message) for message in self.messages)
        write_text(path, SavedConversation(messages=messages).to_json())


def read_conversation(path: Path) -> Conversation:
    """Read a conversation that `/save` wrote.

    Raises:
        InputError: missing, or not a saved conversation.
        MachineError: it cannot be read.
    """
    try:
        saved = SavedConversation.read(path, max_bytes=MAX_SAVED_BYTES)
    except InputError as error:
        raise InputError(
            f"is no saved conversation: {error.what}", where=error.where, expected=error.expected, code="E-CHAT"
        ) from None
    texts = [message.content for message in saved.messages]
    has_system = bool(saved.messages) and saved.messages[0].role == "system"
    return Conversation(texts[0], texts[1:]) if has_system else Conversation("", texts)
