"""Decides what of a growing answer is reasoning, what is text for the reader, and what is a tool call.

Text comes in pieces of any size; whatever may still turn out to be part of a mark is held back. Nothing is lost: what
looked like a call and is none comes out as text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import Enum

from shoal.text.dialect import Dialect

_NUM_HEAD_CHARS_MAX = 1024


@dataclass
class CallPiece:
    """More of call number `index`: its name comes with its first piece, its arguments are JSON in pieces."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass
class Parts:
    """What a piece of the answer turned out to be."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class _State(Enum):
    START = "nothing but space so far"
    REASONING = "between the marks of reasoning"
    CONTENT = "text for the reader"
    HEAD = "before a call's arguments"
    ARGUMENTS = "in a call's arguments"
    TAIL = "between a call's arguments and what follows it"


class AnswerParser:
    """Takes one answer apart. `in_reasoning` where the prompt ends within it, `with_tools` where calls are expected."""

    def __init__(self, dialect: Dialect, *, in_reasoning: bool = False, with_tools: bool = False) -> None:
        self._reasoning = dialect.reasoning
        self._tools = dialect.tools if with_tools else None
        self._state = _State.REASONING if in_reasoning else _State.START
        self._held = ""
        self._skips_space = in_reasoning
        self._json = _JsonEnd()
        self.num_calls = 0
        """Calls that are complete."""
        keys = f'"{self._tools.arguments_key}"' if self._tools is not None else ""
        self._head = re.compile(rf'[\s\[,;]*\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*{keys}\s*:\s*')

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token belongs to the reasoning."""
        return self._state is _State.REASONING

    def push(self, text: str) -> Parts:
        """What is sure, now that `text` has come."""
        self._held += text
        parts = Parts()
        while self._held and self._step(parts):
            pass
        return parts

    def flush(self) -> Parts:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        match self._state:
            case _State.REASONING:
                return Parts(reasoning=held.rstrip())
            case _State.TAIL:
                self.num_calls += held.lstrip().startswith("}")
                return Parts()
            case _State.ARGUMENTS:
                return Parts()
            case _State.HEAD if self._tools is not None and not self.num_calls:
                return Parts(content=self._tools.begin + held)
            case _:
                return Parts(content=held)

    def _step(self, parts: Parts) -> bool:
        """Goes on by one state or piece; whether there may be more to do."""
        if self._skips_space:
            self._held = self._held.lstrip()
            self._skips_space = not self._held
            if not self._held:
                return False
        match self._state:
            case _State.START:
                return self._decide()
            case _State.REASONING:
                return self._reason(parts)
            case _State.CONTENT:
                return self._read(parts)
            case _State.HEAD:
                return self._name(parts)
            case _State.ARGUMENTS:
                return self._argue(parts)
            case _State.TAIL:
                return self._leave()

    def _decide(self) -> bool:
        stripped = self._held.lstrip()
        if self._reasoning is not None:
            if stripped.startswith(self._reasoning.begin):
                self._held = stripped.removeprefix(self._reasoning.begin)
                self._state, self._skips_space = _State.REASONING, True
                return True
            if self._reasoning.begin.startswith(stripped):
                return False
        if self._tools is not None and not self._tools.begin:
            lead = self._tools.lead
            if stripped.startswith("{") or (lead and stripped.startswith(lead)):
                self._held = stripped.removeprefix(lead) if lead else stripped
                self._state = _State.HEAD
                return True
            if not stripped or (lead and lead.startswith(stripped)):
                return False
        self._state = _State.CONTENT
        return True

    def _reason(self, parts: Parts) -> bool:
        assert self._reasoning is not None
        sure, found = self._until(self._reasoning.end)
        parts.reasoning += sure
        if found:
            # After its reasoning an answer starts anew, and may be a call.
            self._state, self._skips_space = _State.CONTENT, True
            if self._tools is not None and not self._tools.begin:
                self._state, self._reasoning = _State.START, None
        return found

    def _read(self, parts: Parts) -> bool:
        if self._tools is None or not self._tools.begin:
            parts.content += self._held
            self._held = ""
            return False
        sure, found = self._until(self._tools.begin)
        parts.content += sure
        if found:
            self._state = _State.HEAD
        return found

    def _until(self, mark: str) -> tuple[str, bool]:
        """The text before `mark` without the space in front of it, and whether the mark has come."""
        at = self._held.find(mark)
        if at >= 0:
            sure, self._held = self._held[:at].rstrip(), self._held[at + len(mark) :]
            return sure, True
        size = next((n for n in range(min(len(mark), len(self._held)), 0, -1) if self._held.endswith(mark[:n])), 0)
        sure = self._held[: len(self._held) - size].rstrip()
        self._held = self._held[len(sure) :]
        return sure, False

    def _name(self, parts: Parts) -> bool:
        assert self._tools is not None
        head = self._head.match(self._held)
        if head is None:
            if len(self._held) > _NUM_HEAD_CHARS_MAX:
                parts.content += self._tools.begin + self._held
                self._held, self._state, self._tools = "", _State.CONTENT, None
            return False
        parts.calls.append(CallPiece(self.num_calls, name=json.loads(head[1], strict=False)))
        self._held = self._held[head.end() :]
        self._state, self._json = _State.ARGUMENTS, _JsonEnd()
        return True

    def _argue(self, parts: Parts) -> bool:
        end = self._json.find(self._held)
        piece = self._held if end is None else self._held[:end]
        self._held = self._held[len(piece) :]
        parts.calls.append(CallPiece(self.num_calls, arguments=piece))
        if end is not None:
            self._state = _State.TAIL
        return end is not None

    def _leave(self) -> bool:
        assert self._tools is not None
        rest = self._held.lstrip()
        end = self._tools.end
        if not rest.startswith("}"):
            return False
        after = rest[1:].lstrip()
        if not after or (end.startswith(after) and after != end):
            return False  # what follows decides
        self.num_calls += 1
        self._held = after.removeprefix(end)
        if self._tools.is_list and after.startswith("]"):
            self._held = after[1:]
        goes_on = (self._tools.is_list or not end) and after[:1] in (",", ";")
        self._state, self._skips_space = (_State.HEAD, False) if goes_on else (_State.CONTENT, True)
        return bool(self._held)


class _JsonEnd:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = False
        self._escaped = False

    def find(self, piece: str) -> int | None:
        """The index behind the object's last character, or None if it is not there yet."""
        for index, character in enumerate(piece):
            if self._in_text:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_text = False
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
        return None
