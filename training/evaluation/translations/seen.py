"""Which sentences of a part were seen in training: a score on those says how well a model remembers.

A row counts as seen if its source or its target, ignoring case, punctuation and simplified or traditional form, stands
in the training part of the data that the run was trained on.
"""

from __future__ import annotations

from training.base.console import UserError
from training.base.progress import Progress
from training.data.languages import Language
from training.data.prepared import Part, Prepared, open_prepared
from training.data.text import normalise
from training.engine.cluster import Cluster
from training.evaluation.translations.trained import TrainedModel


def training_part(trained: TrainedModel, data: Prepared) -> Part | None:
    """What the model was trained on, from `data` or from where the run's config says; None where it is not at hand."""
    fingerprint = trained.checkpoint.manifest["data"]["fingerprint"]
    if data.fingerprint == fingerprint:
        return data.part("train")
    try:
        own = open_prepared(trained.config.data)
    except UserError:
        return None
    return own.part("train") if own.fingerprint == fingerprint else None


def seen_rows(part: Part, train: Part, languages: tuple[Language, Language], cluster: Cluster) -> list[bool]:
    """For each row of `part`, whether it was seen; the ranks share the work. Memory grows with `part` only.

    languages: of the source and of the target.
    """
    own = [
        [normalise(text, language) for text in texts]
        for texts, language in zip((part.source_texts, part.target_texts), languages, strict=True)
    ]
    wanted, found = [set(side) for side in own], [set[str](), set[str]()]
    with Progress("looking for what was seen", len(train), "pairs") as progress:
        for row in cluster.own_part(range(len(train))):
            for side, texts in enumerate((train.source_texts, train.target_texts)):
                text = normalise(texts[row], languages[side])
                if text in wanted[side]:
                    found[side].add(text)
            progress.advance(cluster.world_size)
    everywhere = cluster.gather(found, list[set[str]])
    seen = [set().union(*(of_rank[side] for of_rank in everywhere)) for side in range(2)]
    return [source in seen[0] or target in seen[1] for source, target in zip(*own, strict=True)]
