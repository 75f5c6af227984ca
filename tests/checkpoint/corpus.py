"""The text the test checkpoint is trained on: what comes with CPython, and nothing else.

Plain documents are the standard library's sources and the topics of `pydoc`; dialogues are made from docstrings.
The order of everything is fixed, so one Python version always gives one corpus.
"""

import ast
import hashlib
import random
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

# Tests, what is installed beside the library, and files a build writes (they hold the paths of that build).
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib-dynload"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
# Long tables teach nothing about Python; `pydoc_data` comes in as topics instead.
SKIPPED_TABLES = {"encodings", "pydoc_data", "html/entities.py"}

HELD_OUT_ONE_IN = 50
CUT_ONE_IN = 25
AFTER_SPACES = re.compile(r"(?<= )(?=\S)")
QUESTIONS = ("What does {} do?", "What is {} for?", "Explain {}.")
SYSTEM_PROMPT = "You explain the Python standard library."
ANSWER_CHARACTERS = range(20, 400)

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Document:
    """One text under a stable name, such as `json/decoder.py` or `topic:lambda`."""

    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether the document validates and is never trained on; its name alone decides."""
        return name_number(self.name) % HELD_OUT_ONE_IN == 0


def pieces(document: Document) -> list[str]:
    """Cut a document after the spaces before some of its words, to be tokenized piece by piece.

    The tokenizer gives a space to the word that follows, so uncut text never shows the model a prompt's last space.
    """
    generator = random.Random(name_number(document.name))
    places = [match.start() for match in AFTER_SPACES.finditer(document.text)]
    cuts = [0, *(place for place in places if generator.randrange(CUT_ONE_IN) == 0), len(document.text)]
    return [document.text[start:end] for start, end in pairwise(cuts)]


def name_number(name: str) -> int:
    """Turn a name into a number that looks random and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def read_documents() -> list[Document]:
    """Read the whole corpus of the running Python, sorted by name."""
    documents = [*library_sources(Path(sysconfig.get_path("stdlib"))), *help_topics()]
    return sorted(documents, key=lambda document: document.name)


def library_sources(root: Path) -> Iterator[Document]:
    """Yield every source file under `root` that is Python to learn from."""
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if is_skipped(relative):
            continue
        with tokenize.open(path) as file:  # honours a coding line
            text = file.read()
        if text.strip():
            yield Document(relative.as_posix(), text)


def is_skipped(relative: Path) -> bool:
    """Say whether a file of the standard library stays out of the corpus."""
    return (
        not SKIPPED_FOLDERS.isdisjoint(relative.parts)
        or relative.parts[0].startswith(SKIPPED_PREFIXES)
        or relative.parts[0] in SKIPPED_TABLES
        or relative.as_posix() in SKIPPED_TABLES
    )


def help_topics() -> Iterator[Document]:
    """Yield the language reference's topics, as `help("lambda")` prints them."""
    for name, text in topics.items():
        yield Document(f"topic:{name}", text)


def dialogues(document: Document) -> Iterator[list[Message]]:
    """Yield one question and answer for each documented name of a source file."""
    if not document.name.endswith(".py"):
        return
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for name, docstring in documented_names(ast.parse(document.text), module):
        answer = " ".join(docstring.split("\n\n")[0].split())
        if len(answer) in ANSWER_CHARACTERS:
            yield dialogue(name, answer)


def documented_names(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the docstring of each public class, function and method below `node`."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        if docstring := ast.get_docstring(child):
            yield name, docstring
        if isinstance(child, ast.ClassDef):
            yield from documented_names(child, name)


def dialogue(name: str, answer: str) -> list[Message]:
    """Put a name and its meaning as a chat; every fourth one opens with a system message."""
    number = name_number(name)
    question = QUESTIONS[number % len(QUESTIONS)].format(name)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": SYSTEM_PROMPT}, *turns] if number % 4 == 0 else turns


def digest(documents: list[Document]) -> str:
    """Fingerprint a corpus: sha256 over each name and text in order."""
    state = hashlib.sha256()
    for document in documents:
        state.update(f"{document.name}\0{document.text}\0".encode())
    return state.hexdigest()
