"""The verb `watch`: show the hints of a running server, live."""

import sys
from collections.abc import Iterator

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sonoedge.runtime.client import listen
from sonoedge.runtime.key_files import ClientKeys
from sonoedge.runtime.protocol import Broadcast, Hint, State, Telemetry


def run(
    endpoint: str, count: int | None, timeout_s: float | None, as_json: bool, keys: ClientKeys | None = None
) -> None:
    """Show hints until `count` were seen or Ctrl-C; raises SonoEdgeError after `timeout_s` without one."""
    console = Console(highlight=False)
    if not as_json:
        Console(stderr=True, highlight=False).print(f"[dim]Hints of {endpoint}; Ctrl-C ends.[/]")
    messages = _limited(listen(endpoint, timeout_s=timeout_s, keys=keys), count)
    try:
        if as_json:
            for message in messages:
                if isinstance(message, Hint):
                    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
                    sys.stdout.flush()
        elif console.is_terminal:
            _show_table(console, messages)
        else:
            for message in messages:
                if isinstance(message, Hint):
                    print(_line(message), flush=True)
    except KeyboardInterrupt:
        return


def _limited(messages: Iterator[Broadcast], count: int | None) -> Iterator[Broadcast]:
    """Yield messages until `count` hints were among them."""
    seen = 0
    for message in messages:
        yield message
        seen += isinstance(message, Hint)
        if count is not None and seen >= count:
            return


def _line(hint: Hint) -> str:
    said = f"{hint.text.en} {hint.text.zh}" if hint.text is not None else f"no answer: {hint.reason}"
    return f"frame {hint.frame}  {hint.hint}: {said}  ({hint.probability:.0%}, {hint.age_ms:.0f} ms)"


def _show_table(console: Console, messages: Iterator[Broadcast]) -> None:
    """Keep one row a hint up to date; a hint that is no longer asked leaves with the next frame."""
    newest: dict[str, Hint] = {}
    footer = ""
    with Live(console=console, auto_refresh=False) as live:
        for message in messages:
            match message:
                case Hint():
                    newest[message.hint] = message
                case State():
                    footer = f"{message.name}: {message.state}" + (f" ({message.detail})" if message.detail else "")
                    continue
                case Telemetry():
                    footer = f"{message.frames} frames, {message.dropped} dropped, {message.hints} hints" + (
                        f", p99 {message.p99_ms:.0f} ms" if message.p99_ms is not None else ""
                    )
            live.update(_table(newest, footer), refresh=True)


def _table(newest: dict[str, Hint], footer: str) -> Table:
    latest = max((hint.frame for hint in newest.values()), default=0)
    intended_use = next((hint.intended_use for hint in newest.values()), "")
    table = Table("hint", "answer", "", "probability", title=f"frame {latest}", caption=f"{footer}\n{intended_use}")
    for hint in newest.values():
        if hint.frame < latest - 1:
            continue
        english, chinese = (hint.text.en, hint.text.zh) if hint.text is not None else (hint.reason or "", "")
        style = "dim" if hint.abstain else ""
        table.add_row(Text(hint.hint), Text(english, style), Text(chinese, style), f"{hint.probability:.0%}")
    return table
