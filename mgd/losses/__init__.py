"""Losses: pure functions, and terms that use them; `LOSSES` has the terms by name."""

from mgd.losses.afd import AFD, afd
from mgd.losses.at import AT, at
from mgd.losses.ce import CE
from mgd.losses.crd import CRD, crd
from mgd.losses.dist import DIST, dist
from mgd.losses.dkd import DKD, dkd
from mgd.losses.dml import DML, dml
from mgd.losses.fitnet import FitNet
from mgd.losses.kd import KD, kd
from mgd.losses.map_l2 import MapL2, map_l2
from mgd.losses.masked_generative import MaskedGenerative
from mgd.losses.meal import MEAL, meal
from mgd.losses.mgd import ChannelMatching
from mgd.losses.mlkd import MLKD, mlkd
from mgd.losses.ofd import OFD
from mgd.losses.reviewkd import ReviewKD
from mgd.losses.rkd import RKD, rkd
from mgd.losses.similarity import Similarity, similarity
from mgd.losses.ssld import SSLD, ssld
from mgd.losses.term import EachTeacher, HyperParameters, LogitTerm, Term, Views, standardise
from mgd.losses.udml import UDML
from mgd.losses.wkd_logits import WKDLogits, class_cost, wkd_logits
from mgd.losses.wkd_maps import WKDMaps, wkd_maps
from mgd.losses.wsl import WSL, wsl
from mgd.losses.wttm import WTTM, wttm

LOSSES: dict[str, type[Term]] = {
    "afd": AFD,
    "at": AT,
    "ce": CE,
    "crd": CRD,
    "dist": DIST,
    "dkd": DKD,
    "dml": DML,
    "fitnet": FitNet,
    "kd": KD,
    "map_l2": MapL2,
    "masked_generative": MaskedGenerative,
    "meal": MEAL,
    "mgd": ChannelMatching,
    "mlkd": MLKD,
    "ofd": OFD,
    "reviewkd": ReviewKD,
    "rkd": RKD,
    "similarity": Similarity,
    "ssld": SSLD,
    "udml": UDML,
    "wkd_logits": WKDLogits,
    "wkd_maps": WKDMaps,
    "wsl": WSL,
    "wttm": WTTM,
}

__all__ = [
    "AFD",
    "AT",
    "CE",
    "CRD",
    "DIST",
    "DKD",
    "DML",
    "KD",
    "LOSSES",
    "MEAL",
    "MLKD",
    "OFD",
    "RKD",
    "SSLD",
    "UDML",
    "WSL",
    "WTTM",
    "ChannelMatching",
    "EachTeacher",
    "FitNet",
    "HyperParameters",
    "LogitTerm",
    "MapL2",
    "MaskedGenerative",
    "ReviewKD",
    "Similarity",
    "Term",
    "Views",
    "WKDLogits",
    "WKDMaps",
    "afd",
    "at",
    "class_cost",
    "crd",
    "dist",
    "dkd",
    "dml",
    "kd",
    "map_l2",
    "meal",
    "mlkd",
    "rkd",
    "similarity",
    "ssld",
    "standardise",
    "wkd_logits",
    "wkd_maps",
    "wsl",
    "wttm",
]
