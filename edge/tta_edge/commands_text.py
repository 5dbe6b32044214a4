"""The commands for language models: `text score`, `generate`, `absorb`, `sessions`, `export`, `import`, and what
`stream text:FILE` does. What they need is imported when they run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tta_edge.commands_operate import ENDPOINT, AsJson, BundleName, TimeoutS, To, console, note_durable
from tta_runtime.exit_codes import HELP, ExitCode

text = typer.Typer(
    name="text",
    help=(
        "Score, generate and absorb text with a daemon's language model.\n\n"
        "Example: tta-edge text absorb manual.txt --session manual"
    ),
    epilog=HELP,
    no_args_is_help=True,
)
File = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", help="A text in UTF-8; - reads stdin.", show_default=False),
]
Text = Annotated[
    str | None, typer.Option("--text", help="The text itself, instead of a file.", show_default=False)
]
Session = Annotated[
    str,
    typer.Option("--session", help="Whose context comes before it; without it none.", show_default=False),
]
SessionArgument = Annotated[str, typer.Argument(metavar="SESSION", help="The session's name.")]
PREFIX = "text:"


@text.command("score", epilog=HELP)
def score(
    file: File = None,
    given: Text = None,
    session: Session = "",
    context: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Seen before the text, not scored.", show_default=False),
    ] = None,
    bundle: BundleName = "",
    to: To = ENDPOINT,
    timeout_s: TimeoutS = 30.0,
    as_json: AsJson = False,
) -> None:
    """Say how well a text is predicted, in bits per byte. Changes nothing.

    Example: tta-edge text score chapter2.txt --session book
    """
    from tta_edge.client import Client

    data = _given(file, given)
    before = None if context is None else _read(context)
    with Client(to, timeout_s=timeout_s) as client:
        done = client.score(data, session, bundle, context=before)
    form = {
        "bits": done.bits,
        "bytes": done.bytes,
        "bits_per_byte": done.bits_per_byte,
        "tokens": len(done.nats),
        "skipped": done.skipped,
        "before": done.before,
        "compute_ms": done.compute_ms,
    }
    _show(
        form,
        as_json,
        lambda: (
            f"{done.bits_per_byte:.4f} bits per byte: {done.bits:.1f} bits for {len(done.nats)} tokens of "
            f"{done.bytes} bytes, after {done.before} tokens"
        ),
    )


@text.command("generate", epilog=HELP)
def generate(
    file: File = None,
    given: Text = None,
    session: Session = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most probable token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only the so many most probable tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Only the most probable tokens that together have this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same one gives the same text.")] = 0,
    absorb: Annotated[
        bool, typer.Option("--absorb", help="Let the session absorb the prompt and what follows.")
    ] = False,
    bundle: BundleName = "",
    to: To = ENDPOINT,
    timeout_s: TimeoutS = 30.0,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, and show the text as it comes. Ctrl-C stops the daemon's work on it as well.

    --timeout-s is the longest wait for a token.

    Example: tta-edge text generate --text "Error 42 means" --session manual --temperature 0
    """
    from tta_edge.client import Client

    prompt = _given(file, given)
    with (
        Client(to, timeout_s=timeout_s) as client,
        client.generate(
            prompt, session, bundle, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed, absorb=absorb,
        ) as stream,
    ):  # fmt: skip
        try:
            for part in stream:
                if not as_json:
                    typer.echo(part, nl=False)
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None
    end = stream.end
    if end is None:
        raise typer.Exit(ExitCode.NEGATIVE)
    form = {name: getattr(end, name) for name in end.__dataclass_fields__}
    _show(form, as_json, lambda: "")
    if not as_json and end.absorbed:
        note_durable(end.durable)


@text.command("absorb", epilog=HELP)
def absorb(
    file: File = None,
    given: Text = None,
    session: Annotated[str, typer.Option("--session", help="It begins with its first text.")] = "default",
    bundle: BundleName = "",
    to: To = ENDPOINT,
    timeout_s: TimeoutS = 300.0,
    as_json: AsJson = False,
) -> None:
    """Have a session take a text in: it becomes a change of the model, of the same size however long the text is.

    Example: tta-edge text absorb manual.txt --session manual
    """
    from tta_edge.client import Client
    from tta_edge.status_view import form_of

    data = _given(file, given)
    with Client(to, timeout_s=timeout_s) as client:
        done = client.absorb(data, session, bundle)
    _show(
        form_of(done),
        as_json,
        lambda: (
            f"session {done.session} has absorbed {done.absorbed} tokens, {done.tokens} of them now: {done.chunks} "
            f"chunks, {done.pending} tokens wait for the next; theta {done.theta_digest[:12]}"
        ),
    )
    if not as_json:
        note_durable(done.durable)


@text.command("sessions", epilog=HELP)
def sessions(to: To = ENDPOINT, timeout_s: TimeoutS = 10.0, as_json: AsJson = False) -> None:
    """List a daemon's sessions.

    Example: tta-edge text sessions --json
    """
    from tta_edge.client import Client
    from tta_edge.status_view import sessions_view, status_form

    with Client(to, timeout_s=timeout_s) as client:
        reply = client.status()
    if as_json:
        form = status_form(reply)
        _show({key: form[key] for key in ("sessions", "stored_sessions", "text_bytes")}, True, str)
    else:
        console().print(sessions_view(reply))


@text.command("export", epilog=HELP)
def export(
    session: SessionArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")],
    bundle: BundleName = "",
    to: To = ENDPOINT,
    timeout_s: TimeoutS = 30.0,
    as_json: AsJson = False,
) -> None:
    """Write a session to a file: what its text has become, not the text. A daemon with the same bundle imports it.

    Example: tta-edge text export manual manual.session
    """
    from tta_edge.client import Client
    from tta_edge.output import check_output, write_output

    check_output(file)
    with Client(to, timeout_s=timeout_s) as client:
        data = client.export_session(session, bundle)
    write_output(file, data)
    _show(
        {"session": session, "file": str(file), "bytes": len(data)},
        as_json,
        lambda: f"{file} holds session {session}, {len(data)} bytes",
    )


@text.command("import", epilog=HELP)
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `text export` wrote.")],
    session: SessionArgument,
    bundle: BundleName = "",
    to: To = ENDPOINT,
    timeout_s: TimeoutS = 30.0,
    as_json: AsJson = False,
) -> None:
    """Begin a session with an exported one. A file of another bundle or another tokenizer is refused.

    Example: tta-edge text import manual.session manual
    """
    from tta_edge.client import Client
    from tta_edge.status_view import form_of

    data = _read(file)
    with Client(to, timeout_s=timeout_s) as client:
        done = client.import_session(session, data, bundle)
    _show(
        form_of(done),
        as_json,
        lambda: f"session {done.session} has absorbed {done.absorbed} tokens, theta {done.theta_digest[:12]}",
    )
    if not as_json:
        note_durable(done.durable)


def stream_text(
    source: str,
    *,
    to: str,
    piece_bytes: int | None,
    limit: int | None,
    session: str,
    timeout_s: float,
    json_file: Path | None,
) -> None:
    """What `tta-edge stream text:FILE` does.

    Args:
        source: `text:FILE`.
        to: where the daemon listens.
        piece_bytes: of each piece; None: a third of what the model sees at once, or less where that leaves no room
            for a chunk before it.
        limit: only the first so many pieces.
        session: to use; it is reset first.
        timeout_s: of each request.
        json_file: where the figures go.
    """
    from rich.console import Console

    from tta_edge.client import Client
    from tta_edge.live import PATIENT
    from tta_edge.output import check_output, write_output
    from tta_edge.text_stream import Row, TextStreamer, pieces, to_json
    from tta_edge.text_view import HEAD, line, summary
    from tta_runtime.errors import TtaError

    check_output(json_file)

    data = _read(Path(source.removeprefix(PREFIX)))
    screen = Console()
    rows, interrupted = list[Row](), False
    failed: TtaError | None = None
    with Client(to, timeout_s=timeout_s, retry=PATIENT) as client:
        info = client.info()
        context, chunk = (0, 0) if info.text is None else (info.text.context, info.text.chunk)
        size = piece_bytes or max(1, min(context // 3, context - chunk))
        streamer = TextStreamer(client, pieces(data, size, limit), session=session)
        screen.print(
            f"{source} to {to}: {info.model_id}, method {info.method}, pieces of {size} bytes; the full context is at "
            f"most the {context} tokens that the model sees at once",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        screen.print(HEAD, highlight=False)
        try:
            for row in streamer.run():
                rows.append(row)
                screen.print(line(row), highlight=False)
        except KeyboardInterrupt:
            interrupted = True
        except TtaError as error:
            failed, interrupted = error, True
    if rows:
        screen.print(summary(rows, context), highlight=False, soft_wrap=True)
    if json_file is not None and (rows or failed is None):
        form = to_json(
            rows, model=info.model_id, method=info.method, stream=source, piece_bytes=size, context_tokens=context,
            interrupted=interrupted,
        )  # fmt: skip
        write_output(json_file, json.dumps(form, indent=2, allow_nan=False) + "\n")
    if failed is not None:
        raise failed
    if interrupted:
        raise typer.Exit(ExitCode.INTERRUPTED)


def _given(file: Path | None, given: str | None) -> bytes | str:
    from tta_runtime.errors import BadValue

    fix = "Name a file, - for stdin, or write --text"
    if file is not None and given is not None:
        raise BadValue("both a file and --text were given", fix)
    if file is not None:
        return _read(file)
    if given is None:
        raise BadValue("no text was given", fix)
    return given


def _read(file: Path) -> bytes:
    from tta_runtime.errors import BadValue

    if str(file) == "-":
        return sys.stdin.buffer.read()
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadValue(f"{file} cannot be read: {error.strerror}", "Name a file that you may read") from error


def _show(form: dict[str, Any], as_json: bool, line: Callable[[], str]) -> None:
    if as_json:
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in form.items()
        }
        typer.echo(json.dumps(plain, indent=2, allow_nan=False))
    else:
        typer.echo(line())
