"""An adapter's study: its directions and the rank that it needs, from its factors, in seconds.

spectra       singular values, energy, effective rank
subspaces     similarity of the directions of two updates
projection    amplification of W0's directions by an update
sizes         norms, and the loss of a merge in few bits
adding        interference between adapters that are to be added
advice        the rank that would have been enough, and the evidence for it
planning      the cost of training, beforehand
"""

from __future__ import annotations

from lorica.study.adding import Interference as Interference
from lorica.study.adding import InterferenceReport as InterferenceReport
from lorica.study.adding import interference as interference
from lorica.study.advice import Advice as Advice
from lorica.study.advice import Check as Check
from lorica.study.advice import LayerAdvice as LayerAdvice
from lorica.study.advice import advise as advise
from lorica.study.advice import check as check
from lorica.study.advice import cut as cut
from lorica.study.directions import Side as Side
from lorica.study.directions import directions as directions
from lorica.study.figures import write_report as write_report
from lorica.study.planning import Plan as Plan
from lorica.study.planning import largest_batch as largest_batch
from lorica.study.planning import plan as plan
from lorica.study.projection import Amplification as Amplification
from lorica.study.projection import AmplificationReport as AmplificationReport
from lorica.study.projection import Overlap as Overlap
from lorica.study.projection import OverlapReport as OverlapReport
from lorica.study.projection import WeightSide as WeightSide
from lorica.study.projection import amplification as amplification
from lorica.study.projection import overlap as overlap
from lorica.study.report import Report as Report
from lorica.study.report import gather as gather
from lorica.study.sizes import Drift as Drift
from lorica.study.sizes import DriftReport as DriftReport
from lorica.study.sizes import NormReport as NormReport
from lorica.study.sizes import Norms as Norms
from lorica.study.sizes import drift as drift
from lorica.study.sizes import norms as norms
from lorica.study.spectra import Spectrum as Spectrum
from lorica.study.spectra import SpectrumReport as SpectrumReport
from lorica.study.spectra import spectrum as spectrum
from lorica.study.subspaces import LayerCorrelation as LayerCorrelation
from lorica.study.subspaces import Similarity as Similarity
from lorica.study.subspaces import SimilarityReport as SimilarityReport
from lorica.study.subspaces import compare as compare
from lorica.study.subspaces import correlation as correlation
from lorica.study.subspaces import expected_phi as expected_phi
from lorica.study.subspaces import phi as phi
from lorica.study.subspaces import projection_distance as projection_distance
from lorica.study.subspaces import random_phi as random_phi
from lorica.study.subspaces import similarity as similarity
