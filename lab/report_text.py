"""A comparison in words and figures, and as a Markdown file."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from ..messages import say
from .comparison import Comparison, Pair, Spread, metrics_of
from .picture_metrics import CHANGED_BELOW, METRICS, PictureDifference, package_versions

MOST_LISTED = 10  # of the worst pairs, in Markdown


def title(comparison: Comparison) -> str:
    """`A against B`, the reference last."""
    settings = list_of(comparison.compared)
    return say("{settings} against {reference}", settings=settings, reference=comparison.labels[0])


def list_of(texts: Iterable[str]) -> str:
    return say(", ").join(texts)


def lead(comparison: Comparison) -> str:
    return say(
        "The same prompts and seeds, painted with another {inputs} each time. Every picture is "
        "compared with the one that {reference} gives; the numbers say how far apart they are, not "
        "which is the better one.",
        inputs=list_of(name.rpartition(".")[2] for name in comparison.inputs),
        reference=comparison.labels[0],
    )


def facts(comparison: Comparison) -> dict[str, str]:
    """What was compared, in a few words."""
    return {
        say("Workflow"): comparison.name,
        say("Prompts"): str(len(comparison.prompts)),
        say("Seeds"): list_of(_runs(comparison.seeds)),
        say("Pairs"): str(len(comparison.pairs)),
        say("Failures"): str(len(comparison.failures)),
    }


def _runs(seeds: Sequence[int]) -> list[str]:
    """Those that follow each other as `first..last`."""
    found: list[list[int]] = []
    for seed in seeds:
        if found and seed == found[-1][-1] + 1:
            found[-1][1:] = [seed]
        else:
            found.append([seed])
    return ["..".join(map(str, run)) for run in found]


def metric_name(metric: str) -> str:
    """As a table shows it: those that have no name of their own in the user's language."""
    if metric == "layout":
        return say("composition")
    return say("latents, last step") if metric == "latents" else METRICS[metric].name


def best(metric: str) -> str:
    return say("same: {best}", best=METRICS[metric].shown(METRICS[metric].best))


def explanations(comparison: Comparison) -> dict[str, str]:
    """What each number means, by its name."""
    texts = {
        "flip": say(
            "The difference that an eye sees when both pictures take turns in one place, by "
            "colour and edges; 0 to 1. Its map shows where."
        ),
        "ssimulacra2": say(
            "Made after the judgement of thousands of viewers: from 90 on a difference is hardly "
            "seen when the pictures take turns, from 70 on hardly side by side; below 50 it is "
            "plain. For pictures of 256 pixels and more."
        ),
        "ssim": say("Structure in small windows; 1 is the same. It hardly looks at colour."),
        "psnr": say(
            "The mean squared difference of the pixels in decibel, 80 at most. It knows nothing of "
            "what an eye sees."
        ),
        "lpips": say("The distance of what a network for photographs sees; 0 is the same."),
        "layout": say(
            "SSIM of both pictures in grey, with 32 pixels along the longer side: what is left is "
            "the composition. Below {threshold} it is counted as another composition.",
            threshold=CHANGED_BELOW,
        ),
        "latents": say(
            "The relative error of the picture before it is decoded, as each step leaves it: the "
            "norm of the difference by that of the reference."
        ),
    }
    return {metric_name(metric): texts[metric] for metric in metrics_of(comparison.pairs)}


def changed_of(comparison: Comparison, label: str) -> str:
    return say(
        "{changed} of {pairs}", changed=comparison.changed(label), pairs=len(comparison.of(label))
    )


def packages() -> str:
    return ", ".join(f"{name} {version}" for name, version in package_versions().items())


def markdown(comparison: Comparison) -> str:
    """The whole report but for its pictures."""
    metrics = metrics_of(comparison.pairs)
    names = [metric_name(metric) for metric in metrics]
    rows = [
        [label, *(_cell(comparison.spread(label, m), m) for m in metrics),
         changed_of(comparison, label)]
        for label in comparison.compared
    ]  # fmt: skip
    worst = [
        [pair.id, *(METRICS[m].shown(pair.values[m]) if m in pair.values else "" for m in metrics),
         say("yes") if pair.changed else ""]
        for pair in comparison.worst()[:MOST_LISTED]
    ]  # fmt: skip
    changed = say("other composition")
    parts = [
        f"# {title(comparison)}",
        lead(comparison),
        "\n".join(f"- {name}: {value}" for name, value in facts(comparison).items()),
        f"## {say('In short')}",
        _table([say("Setting"), *names, changed], rows),
        spread_note(),
        f"## {say('The worst cases')}",
        _table([say("Picture"), *names, changed], worst),
        *_failures(comparison),
        f"## {say('What the numbers mean')}",
        "\n".join(f"- **{name}**: {text}" for name, text in explanations(comparison).items()),
        f"## {say('The machine')}",
        "\n".join(f"- {line.lstrip('- ')}" for line in machine_lines(comparison)),
    ]
    return "\n\n".join(parts) + "\n"


def spread_note() -> str:
    return say("Mean ± standard deviation over prompts and seeds, and the worst case.")


def machine_lines(comparison: Comparison) -> list[str]:
    measured_by = say("measured by: {packages}", packages=packages())
    return [*comparison.machine.splitlines(), measured_by]


def shown_values(pair: Pair) -> dict[str, str]:
    """Of one pair, by the names of the metrics."""
    return {
        metric_name(metric): METRICS[metric].shown(value) for metric, value in pair.values.items()
    }


def difference_in_words(difference: PictureDifference) -> str:
    """Of one pair, as a node shows it."""
    told = list_of(_told(difference.values))
    if difference.changed:
        return say("{values}; the composition is another one", values=told)
    return say("{values}; the composition is the same", values=told)


def mean_in_words(differences: Sequence[PictureDifference]) -> str:
    """Of several pairs: the mean, and how many are another picture."""
    means = {
        metric: fmean(each.values[metric] for each in differences)
        for metric in differences[0].values
    }
    return say(
        "mean of {count}: {values}; {changed} with another composition",
        count=len(differences),
        values=list_of(_told(means)),
        changed=sum(each.changed for each in differences),
    )


def _told(values: Mapping[str, float]) -> list[str]:
    return [f"{metric_name(m)} {METRICS[m].shown(value)}" for m, value in values.items()]


def _cell(found: Spread | None, metric: str) -> str:
    if found is None:
        return ""
    mean, deviation, worst = (
        METRICS[metric].shown(value) for value in (found.mean, found.deviation, found.worst)
    )
    return say("{mean} ± {deviation}, worst {worst}", mean=mean, deviation=deviation, worst=worst)


def _failures(comparison: Comparison) -> list[str]:
    if not comparison.failures:
        return []
    lines = (f"- {id}: {' '.join(text.split())}" for id, text in comparison.failures.items())
    return [f"## {say('Failures')}", "\n".join(lines)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in (heads, *rows))
    head, *lines = (f"| {' | '.join(row)} |" for row in escaped)
    return "\n".join([head, "|" + "---|" * len(heads), *lines])
