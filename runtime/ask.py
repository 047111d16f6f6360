"""The verbs `ask` and `report`: put one question to a running server and show the answer as it comes."""

import sys
from collections.abc import Iterable, Sequence

import msgspec
from rich.console import Console

from sonoedge.runtime.client import Client
from sonoedge.runtime.key_files import ClientKeys
from sonoedge.runtime.protocol import Answer, Language, Token


def run(
    endpoint: str,
    question: str,
    language: Language | None,
    timeout_s: float | None,
    as_json: bool,
    keys: ClientKeys | None = None,
    choices: Sequence[str] = (),
    frames: Sequence[str] = (),
) -> None:
    """Print the answer; raises SonoEdgeError when the server refuses or is silent for `timeout_s`."""
    with Client(endpoint, timeout_s=timeout_s, keys=keys) as client:
        _show(client.ask(question, language=language, choices=choices, frames=frames), as_json)


def run_report(
    endpoint: str,
    language: Language,
    timeout_s: float | None,
    as_json: bool,
    keys: ClientKeys | None = None,
    frames: Sequence[str] = (),
) -> None:
    """Print a report; raises as `run` does."""
    with Client(endpoint, timeout_s=timeout_s, keys=keys) as client:
        _show(client.report(language, frames=frames), as_json)


def _show(replies: Iterable[Token | Answer], as_json: bool) -> None:
    for reply in replies:
        if isinstance(reply, Token):
            if not as_json:
                sys.stdout.write(reply.text)
                sys.stdout.flush()
        elif as_json:
            sys.stdout.write(msgspec.json.encode(reply).decode() + "\n")
        else:
            _end(reply)
            about = f"frame {reply.frame}, {reply.tokens} tokens in {reply.ms:.0f} ms, model {reply.model[:12]}"
            ended = "" if reply.finish == "stop" else f", cut short: {reply.finish}"
            Console(stderr=True, highlight=False).print(f"[dim]{about}{ended}. {reply.intended_use}[/]")


def _end(answer: Answer) -> None:
    """End the streamed line, or say what was chosen, and what speaks against the picture."""
    if answer.candidates is not None:
        for choice, share in sorted(answer.candidates.items(), key=lambda item: -item[1]):
            sys.stdout.write(f"{share:6.1%}  {choice}\n")
        sys.stdout.write("no answer" if answer.abstain else answer.answer)
    sys.stdout.write(f"  ({answer.reason})\n" if answer.reason else "\n")
    sys.stdout.flush()
