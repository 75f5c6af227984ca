"""What a person can type in a chat: messages, and commands that start with a slash."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from plans.errors import UsageError, printable
from plans.reading.files import typed_path
from runtime.chat.chat import Answer, Chat
from runtime.chat.conversation import Conversation, read_conversation
from runtime.chat.template import special_tokens_in
from runtime.session import AnySession

HELP = """\
/undo          take back the last message and its answer
/retry         answer the last message again
/edit [TEXT]   change the last message to TEXT and answer it
/system [TEXT] set the system message, or remove it
/save FILE     write the conversation to a file
/load FILE     go on with a saved conversation
/reset         forget everything but the system message
/help          show this
/exit          leave (so does Ctrl-D)
A message that starts with a slash is written with two. Ctrl-C stops an answer; what was said of it stays."""


class Screen(Protocol):
    """Where a chat writes, and how it asks for a line again."""

    def text(self, piece: str) -> None:
        """Show a piece of an answer."""

    def note(self, text: str) -> None:
        """Show a remark."""

    def ask_again(self, text: str) -> str | None:
        """Let a person change a line; None where nobody is there to do it."""


class ChatCommands:
    """Runs lines: a message is answered, a command is carried out.

    Args:
        chat: the conversation.
        session: its model.
        screen: where to write.
    """

    def __init__(self, chat: Chat, session: AnySession, *, screen: Screen) -> None:
        self._chat = chat
        self._session = session
        self._screen = screen
        self._commands: dict[str, Callable[[str], None]] = {
            "/undo": self._undo,
            "/retry": self._retry,
            "/edit": self._edit,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/reset": self._reset,
            "/help": lambda _text: self._screen.note(HELP),
        }

    def run(self, line: str) -> bool:
        """Run one line; return whether the chat goes on.

        Raises:
            UsageError: there is no such command, or it cannot be carried out now.
            LlamaplanError: as `Chat.send`, `Conversation.save` and `read_conversation`.
        """
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._send(line.removeprefix("/"))
            return True
        name, _, text = line.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name not in self._commands:
            raise UsageError(
                f"there is no command {printable(name, limit=40)}",
                expected=", ".join([*self._commands, "/exit"]),
                hint="a message that starts with a slash is written with two",
                code="E-CHAT",
            )
        self._commands[name](text.strip())
        return True

    def _send(self, text: str) -> None:
        special = special_tokens_in(self._session.prepared.tokenizer, [{"content": text}])
        if special:
            self._screen.note(f"({', '.join(special)} in a message is plain text to the model, not a special token)")
        answer = self._chat.send(text, on_text=self._screen.text)
        if answer is None:
            self._screen.note("(stopped before the answer began; the message was taken back)")
            return
        self._screen.text("\n")
        remark = self._remark(answer)
        if remark:
            self._screen.note(remark)

    def _remark(self, answer: Answer) -> str:
        context = self._session.prepared.context_tokens
        if answer.is_context_full:
            return (
                f"(the answer ends here because the context is full: {answer.num_context_tokens} of {context} tokens; "
                "take turns back with /undo, or start anew with /reset)"
            )
        if answer.finish_reason == "length":
            return f"(stopped after {answer.num_tokens} tokens, as --max-tokens says)"
        return "(stopped)" if answer.finish_reason == "interrupted" else ""

    def _undo(self, _text: str) -> None:
        message = self._chat.conversation.undo()
        self._screen.note(f"(took back: {printable(message, limit=60)})")

    def _retry(self, _text: str) -> None:
        self._replace_last("")

    def _edit(self, text: str) -> None:
        changed = text or self._screen.ask_again(self._chat.conversation.last_message)
        if not changed or not changed.strip():
            raise UsageError("nothing to send instead", expected="/edit TEXT", code="E-CHAT")
        self._replace_last(changed)

    def _replace_last(self, text: str) -> None:
        """Answer the last message, or `text` instead of it, again; without a new answer everything stays."""
        conversation = self._chat.conversation
        before = list(conversation.turns)
        message = conversation.undo()
        try:
            self._send(text or message)
        finally:
            if len(conversation.turns) < len(before):
                conversation.turns[:] = before

    def _system(self, text: str) -> None:
        self._chat.conversation.system = text
        self._screen.note("(system message set)" if text else "(system message removed)")

    def _save(self, text: str) -> None:
        path = _path(text, "/save")
        self._chat.conversation.save(path)
        self._screen.note(f"(saved {len(self._chat.conversation.messages)} messages to {path})")

    def _load(self, text: str) -> None:
        path = _path(text, "/load")
        self._chat.conversation = read_conversation(path)
        self._screen.note(f"(loaded {len(self._chat.conversation.messages)} messages from {path})")

    def _reset(self, _text: str) -> None:
        self._chat.conversation = Conversation(self._chat.conversation.system)
        self._screen.note("(forgotten)")


def _path(text: str, command: str) -> Path:
    if not text:
        raise UsageError(f"{command} needs a file", expected=f"{command} FILE", code="E-CHAT")
    return typed_path(text)
