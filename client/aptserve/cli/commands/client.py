"""``generate``: the command of those who use a service."""

from __future__ import annotations

from typing import Annotated

import typer

from aptserve.cli import options as opt

_SAMPLING = "Sampling"
_ENDING = "Ending"
_OBJECTIVES = "Objectives"
_SCHEDULING = "Scheduling"


def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads standard input.")
    ],
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-n",
            metavar="COUNT",
            show_default="256",
            help="Most new tokens.",
            rich_help_panel=_ENDING,
        ),
    ] = None,
    min_tokens: Annotated[
        int,
        typer.Option(
            "--min-tokens",
            metavar="COUNT",
            help="New tokens before the model may end the text.",
            rich_help_panel=_ENDING,
        ),
    ] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="Text that ends the answer; may be given more than once.",
            rich_help_panel=_ENDING,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos",
            help="Go on after the model's end-of-sequence token.",
            rich_help_panel=_ENDING,
        ),
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            "-t",
            metavar="NUMBER",
            help="0 takes the most likely token every time; more is more varied.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k",
            metavar="COUNT",
            help="Choose among so many most likely tokens; 0: all.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            metavar="SHARE",
            help="Choose among the smallest set of tokens with this probability.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p",
            metavar="SHARE",
            help="Leave out tokens under this share of the most likely one's probability.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            "--repetition-penalty",
            metavar="NUMBER",
            help="Above 1: less of what the text has already.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0,
    presence_penalty: Annotated[
        float,
        typer.Option(
            "--presence-penalty",
            metavar="NUMBER",
            help="Taken from the logit of every token that the answer has already.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0,
    frequency_penalty: Annotated[
        float,
        typer.Option(
            "--frequency-penalty",
            metavar="NUMBER",
            help="The same, for each time the answer has it.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="NUMBER",
            show_default="random",
            help="Equal seed and prompt give equal tokens, whatever else runs.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    ttft: Annotated[
        float | None,
        opt.duration(
            "--ttft",
            default="the service's",
            description="Objective for the time to the first token.",
            panel=_OBJECTIVES,
        ),
    ] = None,
    tbt: Annotated[
        float | None,
        opt.duration(
            "--tbt",
            default="the service's",
            description="Objective for the P99 time between tokens.",
            panel=_OBJECTIVES,
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            "--tenant",
            metavar="NAME",
            show_default="the default one",
            help="Whose request it is, for policies that share the service fairly.",
            rich_help_panel=_SCHEDULING,
        ),
    ] = None,
    priority: Annotated[
        int,
        typer.Option(
            "--priority",
            metavar="NUMBER",
            help="-100 to 100; higher is more urgent. What comes of it is up to the policy.",
            rich_help_panel=_SCHEDULING,
        ),
    ] = 0,
    expected_output_tokens: Annotated[
        int | None,
        typer.Option(
            "--expected-output-tokens",
            metavar="COUNT",
            show_default="unknown",
            help="Your guess of the answer's length, for policies that predict.",
            rich_help_panel=_SCHEDULING,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="NAME", show_default="the served one", help="Model to ask."
        ),
    ] = None,
    json: opt.Json = False,
    address: opt.Address = opt.DEFAULT_ADDRESS,
    api_key: opt.ApiKey = None,
    timeout: opt.Timeout = None,
) -> None:
    """Continue a text, and show the answer as it comes.

    The answer goes to standard output, a summary to standard error when that is a terminal. --json
    prints one object at the end instead: text, token_ids, finish_reason, usage and timing. Ctrl-C
    ends the request and exits with 130.

    [bold]Examples[/]
      aptserve generate "def fibonacci(n):"
      aptserve generate "import os" --max-tokens 64 --temperature 0.8 --seed 1
      aptserve generate - --stop $'\\n\\n' < prompt.txt
      aptserve generate "class Stack:" --json | jq .usage
    """
    from aptserve import Objectives, SamplingParams
    from aptserve.cli.generation import GenerateOptions, run_generate
    from aptserve.hints import Hints

    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop_strings=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    run_generate(
        prompt,
        GenerateOptions(
            sampling=sampling,
            objectives=Objectives(ttft_seconds=ttft, tbt_seconds=tbt),
            model=model,
            timeout_seconds=timeout,
            hints=Hints(tenant or "", priority, expected_output_tokens),
            json=json,
        ),
        address=address,
        api_key=api_key,
    )
