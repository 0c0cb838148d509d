"""Identifiers of licenses that the Hub accepts in a model card.

Source: docs/hub/repositories-licenses.md of github.com/huggingface/hub-docs, August 2026. The Hub
adds identifiers, so an unknown one causes a warning and is not refused.
"""

from difflib import get_close_matches

LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m
    bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause
    bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc
    h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 grok2-community gemma unknown other
    """.split()
)


def license_warning(license: str) -> str | None:
    """Return a warning about an unknown identifier; None for a known one."""
    if license in LICENSES:
        return None
    near = get_close_matches(license.lower().replace(" ", "-"), LICENSES, cutoff=0.5)
    advice = f"Is it {' or '.join(near)}? " if near else ""
    return (
        f"the Hub is not known to accept the license {license!r}, and refuses a card with one that "
        f"it does not accept. {advice}For a license without an identifier, give other."
    )
