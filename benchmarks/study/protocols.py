"""What the study compares, on which data, for how long: the rows of run.py and report.py.

A protocol has a test set, which nothing is chosen by, and training cases. Its purposes:

- "validation": all labels for several lengths, which say what longer training would add, and variants of methods, whose
  defaults are to rest on these; on cases of the training set that no network of the draw has seen. All variants are
  tried on the first draw of one protocol, and those that did best there on other draws and protocols. A protocol may
  have variants of its own, for its first draw.
- "test": the methods, and on the first draw again with more labels the bounds and those that did best on validation
  cases. Later draws have the methods of ON_ALL_DRAWS alone, without those that others dominated on the first one, and
  without PReL after Semi-CML Plus, which chance may have set apart from it: the whole is to fit about 40 core-hours of
  a CPU.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

PURPOSES = ("validation", "test")


class Protocol(NamedTuple):
    """Data, networks and length.

    Attributes:
        title: for tables.
        source: the raw dataset, a folder below --data, or none for synthetic patients.
        modalities: name -> its channels by name, as planning takes them.
        foreground: the class.
        labeled: numbers of training cases that keep their labels, the main comparison first; all is added to these.
        num_validation: cases of the training set that "validation" holds out.
        steps: of a training; both stages together, where there are two.
        lengths: other numbers of steps, for which the networks of the first draw are trained on all labels.
        draws: of labeled and validation cases, each also the seed of weights and patches.
        configuration: nnU-Net's.
        plan: options of planning.
        patch_size: None as planned.
        features: at full resolution; twice as many at each lower one. Encoder and decoder have one convolution at each.
        stages: resolutions of the networks; None as planned.
        batch_size: of labeled and of unlabeled patches.
        only_slices: whether cases consist of the slices with foreground alone.
        alphabetical: whether the first cases in alphabetical order are labeled instead of drawn ones.
        first: cases that are labeled before all others.
    """

    title: str
    source: str | None
    modalities: Mapping[str, str]
    foreground: str
    labeled: Sequence[int]
    num_validation: int
    steps: int
    lengths: Sequence[int]
    draws: Sequence[int] = (0, 1, 2)
    configuration: str = "2d"
    plan: Sequence[object] = ()
    patch_size: Sequence[int] | None = None
    features: int = 8
    stages: int | None = None
    batch_size: int = 8
    only_slices: bool = False
    alphabetical: bool = False
    first: Sequence[str] = ()


_LGG = {"FLAIR": "FLAIR", "T1post": "T1post"}
# nominal mm, twice the original distance in the plane: slices of 64 × 64
_COARSE = ("-overwrite_target_spacing", 5, 4, 4)
PROTOCOLS = {
    "lgg": Protocol(
        "Gliomas, whole volumes", "Dataset700_LGG", _LGG, "tumour", (5, 15), 15, 3000, (2000, 4500), plan=_COARSE
    ),
    "lgg_slices": Protocol(
        "Gliomas, slices with tumour alone",
        "Dataset700_LGG",
        _LGG,
        "tumour",
        (5,),
        15,
        3000,
        (2000,),
        plan=_COARSE,
        only_slices=True,
    ),
    "ombria": Protocol(
        "Floods, radar and optical satellite",
        "Dataset710_OMBRIA",
        {
            "S1": "S1before,S1after",
            "S2": ",".join(f"S2{when}_{band}" for when in ("before", "after") for band in "RGB"),
        },
        "flood",
        (12, 62),
        124,
        3000,
        (2000, 4500),
        plan=("-overwrite_target_spacing", 999, 2, 2),  # 999: nnU-Net's for images without depth
    ),
    "la": Protocol(
        "Left atria",
        "Dataset720_LA",
        {"GEMRI": "GEMRI"},
        "left_atrium",
        (8,),
        16,
        3000,
        (2000,),
        draws=(0,),
        configuration="3d_fullres",
        plan=("-overwrite_target_spacing", 2.5, 2.5, 2.5),  # so that a patch is a whole volume
        patch_size=(24, 40, 48),
        stages=4,
        batch_size=4,
        alphabetical=True,
    ),
    "phantom": Protocol("Phantom", None, {"FLAIR": "FLAIR", "T1": "T1"}, "lesion", (5,), 15, 3000, (), draws=(0,)),
}

LOWER, UPPER = "few labels", "all labels"
# method for tables: the trainers of the study, each of which starts from the one before
ALONE = {
    "Mean Teacher": ["MeanTeacher"],
    "BCP": ["BCP"],
    "BCP Plus": ["BCPPlus"],
    "FixMatch": ["FixMatch"],
    "UniMatch": ["UniMatch"],
    "FilterMatch": ["FilterMatch"],
}
TOGETHER = {
    "cross-modal CPS": ["CrossModalCPS"],
    "Semi-CML": ["SemiCML"],
    "Semi-CML + PReL": ["First_SemiCML", "PReL"],
    "Semi-CML Plus": ["SemiCMLPlus"],
    "Semi-CML Plus + PReL": ["First_SemiCMLPlus", "PReL_Plus"],
    "cross-modal BCP": ["CrossModalBCP"],
}
ONLY_ALONE = {  # where there is one modality
    "UA-MT": ["UAMT"],
    "CPS": ["CPS"],
    "SECL, region": ["SECLRegion"],
    "SECL, anatomical": ["SECLAnatomical"],
}
PUBLISHED = {name: TOGETHER[name] for name in ("Semi-CML", "Semi-CML + PReL")}  # and what is compared with them
METHODS = {
    "lgg": {**ALONE, **TOGETHER},
    "lgg_slices": {**PUBLISHED, "BCP": ALONE["BCP"], "Semi-CML Plus": TOGETHER["Semi-CML Plus"]},
    # both modalities are about equally good on validation patches, which fold "all" has none of
    "ombria": {**ALONE, **TOGETHER, "Semi-CML Plus, taught both ways": ["Plus_both_ways"]},
    "la": {**ONLY_ALONE, **ALONE},
    "phantom": {**ALONE, **TOGETHER},
}
BEST: Mapping[str, Sequence[str]] = {  # on validation cases; also trained with more labels
    "lgg": ("Semi-CML Plus", "Semi-CML + PReL", "Semi-CML"),
    "ombria": ("Semi-CML Plus",),
}
ON_ALL_DRAWS = (*PUBLISHED, "Semi-CML Plus", "Semi-CML Plus, taught both ways", "BCP Plus")
VARIANTS = {
    "Semi-CML": ["SemiCML"],
    "Semi-CML, one way": ["SemiCML_OneWay"],
    "Semi-CML, hard pseudo-labels": ["HardSemiCML"],
    "BCP": ["BCP"],
    "BCP, Dice smoothed by 1e-5": ["BCP_smooth"],
    "BCP Plus": ["BCPPlus"],
    "cross-modal CPS": ["CrossModalCPS"],
    "cross-modal CPS, Dice smoothed by 1e-5": ["CrossModalCPS_smooth"],
    "Semi-CML Plus, Dice smoothed by 1e-5": ["SemiCMLPlus_smooth"],
    "Semi-CML + PReL, Dice smoothed by 1e-5": ["First_SemiCML", "PReL_smooth"],
    "FixMatch": ["FixMatch"],
    "FixMatch, warm-up 0.25": ["FixMatch_warmup"],
    "UniMatch": ["UniMatch"],
    "UniMatch, warm-up 0.25": ["UniMatch_warmup"],
    "cross-modal BCP": ["CrossModalBCP"],
    "cross-modal BCP, all teachers": ["XBCP_all"],
    "cross-modal BCP, all components": ["XBCP_components"],
    "cross-modal BCP, unmixed labels too": ["XBCP_unmixed_labels"],
    "cross-modal BCP, every pair both ways": ["XBCP_both_ways"],
    "cross-modal BCP, warm-up 0.5": ["XBCP_warmup_05"],
    "cross-modal BCP, pseudo-labels 1": ["XBCP_weight_1"],
    "Semi-CML Plus": ["SemiCMLPlus"],
    "Semi-CML Plus, mixtures alone": ["XBCP_combined"],
    "Semi-CML Plus, taught both ways": ["Plus_both_ways"],
    "Semi-CML Plus, Semi-CML's terms": ["Plus_consistency"],
    "Semi-CML + PReL": ["First_SemiCML", "PReL"],
    "Semi-CML + PReL, EMA teachers": ["First_SemiCML_ema", "PReL_ema"],
    "Semi-CML + PReL by copy-paste": ["First_SemiCML_ema", "PReL_copy_paste"],
    "Semi-CML Plus + PReL": ["First_SemiCMLPlus", "PReL_Plus"],
    "cross-modal BCP, own teacher": ["XBCP_own"],
    "cross-modal BCP, other teacher": ["XBCP_others"],
    "cross-modal BCP, sure from 0.8": ["XBCP_sure"],
    "cross-modal BCP, strong views": ["XBCP_strong"],
    "cross-modal BCP, ASC of mixtures": ["XBCP_asc"],
    "cross-modal BCP, no warm-up": ["XBCP_warmup_0"],
}
SCREENED_ON = "lgg"
FINALISTS = (
    "Semi-CML",
    "Semi-CML + PReL",
    "Semi-CML Plus",
    "Semi-CML Plus, mixtures alone",
    "BCP Plus",
)  # of the variants, by the first draw
OF_ITS_OWN: Mapping[str, Mapping[str, Sequence[str]]] = {  # protocol -> variants
    "ombria": {
        "Semi-CML Plus, radar teaches": ["Plus_radar_teaches"],
        "Semi-CML Plus, taught both ways": VARIANTS["Semi-CML Plus, taught both ways"],
    },
    "la": {"BCP": ["BCP"], "BCP Plus, largest components": ["BCPPlus_components"]},
}


class Task(NamedTuple):
    """A method on a draw.

    Attributes:
        protocol: its name.
        purpose: see above.
        draw: of the protocol.
        labeled: cases; 0: all.
        method: its name for tables.
        trainers: , without "Protocol_"; the last one is evaluated.
        steps: of all of them together.
    """

    protocol: str
    purpose: str
    draw: int
    labeled: int
    method: str
    trainers: tuple[str, ...]
    steps: int


def tasks_of(name: str, purpose: str) -> list[Task]:
    """What to run, draw by draw, the bounds first."""
    protocol = PROTOCOLS[name]
    few, *more = protocol.labeled
    variants = VARIANTS if len(protocol.modalities) > 1 else {}  # they are of methods for several
    own = OF_ITS_OWN.get(name, {}) if purpose == "validation" else {}
    methods = METHODS[name] if purpose == "test" else variants | own
    bounds = [(0, UPPER, ["Supervised"]), (few, LOWER, ["Supervised"])]
    everywhere = ON_ALL_DRAWS if purpose == "test" else FINALISTS
    on_first = {*everywhere, *(methods if purpose == "test" or name == SCREENED_ON else own)}
    later, first = (
        [*bounds, *((few, method, trainers) for method, trainers in methods.items() if method in chosen)]
        for chosen in (everywhere, on_first)
    )
    if purpose == "test":
        first += [(n, m, t) for n in more for m, t in [(LOWER, ["Supervised"]), *((m, methods[m]) for m in BEST[name])]]
    tasks = [
        Task(name, purpose, draw, n, method, tuple(trainers), protocol.steps)
        for draw in protocol.draws
        for n, method, trainers in (first if draw == protocol.draws[0] else later)
    ]
    if purpose == "validation":
        tasks += [Task(name, purpose, 0, 0, UPPER, ("Supervised",), steps) for steps in protocol.lengths]
    return tasks
