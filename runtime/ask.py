"""The verb `ask`: put one question to a running server and show the answer as it comes."""

import sys

import msgspec
from rich.console import Console

from sonoedge.runtime.client import Client
from sonoedge.runtime.key_files import ClientKeys
from sonoedge.runtime.protocol import Language, Token


def run(
    endpoint: str,
    question: str,
    language: Language | None,
    timeout_s: float | None,
    as_json: bool,
    keys: ClientKeys | None = None,
) -> None:
    """Print the answer; raises SonoEdgeError when the server refuses or is silent for `timeout_s`."""
    with Client(endpoint, timeout_s=timeout_s, keys=keys) as client:
        for reply in client.ask(question, language=language):
            if isinstance(reply, Token):
                if not as_json:
                    sys.stdout.write(reply.text)
                    sys.stdout.flush()
            elif as_json:
                sys.stdout.write(msgspec.json.encode(reply).decode() + "\n")
            else:
                sys.stdout.write("\n")
                sys.stdout.flush()
                about = f"frame {reply.frame}, {reply.tokens} tokens in {reply.ms:.0f} ms, model {reply.model[:12]}"
                ended = "" if reply.finish == "stop" else f", cut short: {reply.finish}"
                Console(stderr=True, highlight=False).print(f"[dim]{about}{ended}. {reply.intended_use}[/]")
