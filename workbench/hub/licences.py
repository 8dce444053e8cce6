"""What a base's licence asks of somebody who passes on a quantized form of it, which is a derivative of the base.

Identifiers are those of the hub's model cards. The summaries are for orientation and no legal advice; each entry
names the text that counts. A licence that is not here is treated as unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """One licence, as far as redistribution goes."""

    id: str
    name: str
    link: str
    asks: tuple[str, ...] = ()
    """What whoever passes a derivative on has to do."""
    redistribution: bool = True
    """Whether derivatives may be passed on at all."""
    standard: bool = True
    """Whether the hub knows the identifier; else the card says `other` and the name."""


_COPY = "pass on a copy of the licence"
_LLAMA = (
    'show "Built with Llama" where the model is offered',
    'begin the name of the model with "Llama"',
    "abide by the acceptable use policy, and ask Meta first above 700 million monthly users",
)


def _llama(version: str) -> tuple[str, ...]:
    notice = (
        f'put in a text file named "Notice": "{version} is licensed under the {version} Community License, '
        'Copyright © Meta Platforms, Inc. All Rights Reserved."'
    )
    return (_COPY.replace("licence", "agreement"), notice, *_LLAMA)


LICENCES: dict[str, Licence] = {
    licence.id: licence
    for licence in (
        Licence(
            "apache-2.0",
            "Apache License 2.0",
            "https://www.apache.org/licenses/LICENSE-2.0",
            (_COPY, "keep its notices, and say that the files were changed"),
        ),
        Licence("mit", "MIT License", "https://opensource.org/license/mit", (_COPY + " with its copyright notice",)),
        Licence("bsd-3-clause", "BSD 3-Clause", "https://opensource.org/license/bsd-3-clause", (_COPY,)),
        Licence(
            "cc-by-4.0",
            "CC BY 4.0",
            "https://creativecommons.org/licenses/by/4.0/",
            ("name the author, link the licence, and say what was changed",),
        ),
        Licence(
            "cc-by-sa-4.0",
            "CC BY-SA 4.0",
            "https://creativecommons.org/licenses/by-sa/4.0/",
            ("name the author, say what was changed, and use the same licence",),
        ),
        Licence(
            "cc-by-nc-4.0",
            "CC BY-NC 4.0",
            "https://creativecommons.org/licenses/by-nc/4.0/",
            ("name the author, say what was changed, and allow no commercial use",),
        ),
        Licence(
            "cc-by-nd-4.0", "CC BY-ND 4.0", "https://creativecommons.org/licenses/by-nd/4.0/", redistribution=False
        ),
        Licence(
            "cc-by-nc-nd-4.0",
            "CC BY-NC-ND 4.0",
            "https://creativecommons.org/licenses/by-nc-nd/4.0/",
            redistribution=False,
        ),
        Licence(
            "llama2",
            "Llama 2 Community License",
            "https://ai.meta.com/llama/license/",
            (
                _COPY.replace("licence", "agreement"),
                'put in a text file named "Notice": "Llama 2 is licensed under the LLAMA 2 Community License, '
                'Copyright (c) Meta Platforms, Inc. All Rights Reserved."',
                _LLAMA[2],
            ),
        ),
        Licence(
            "llama3", "Meta Llama 3 Community License", "https://llama.meta.com/llama3/license/", _llama("Meta Llama 3")
        ),
        Licence(
            "llama3.1", "Llama 3.1 Community License", "https://llama.meta.com/llama3_1/license/", _llama("Llama 3.1")
        ),
        Licence(
            "llama3.2", "Llama 3.2 Community License", "https://www.llama.com/llama3_2/license/", _llama("Llama 3.2")
        ),
        Licence(
            "llama3.3", "Llama 3.3 Community License", "https://www.llama.com/llama3_3/license/", _llama("Llama 3.3")
        ),
        Licence("llama4", "Llama 4 Community License", "https://www.llama.com/llama4/license/", _llama("Llama 4")),
        Licence(
            "gemma",
            "Gemma Terms of Use",
            "https://ai.google.dev/gemma/terms",
            (
                "bind whoever gets it to the terms' use restrictions (section 3.2)",
                "pass on a copy of the terms",
                "say that the files were changed",
                'put in a text file named "Notice": "Gemma is provided under and subject to the Gemma Terms of Use '
                'found at ai.google.dev/gemma/terms"',
            ),
        ),
        Licence(
            "qwen",
            "Qwen License Agreement",
            "https://huggingface.co/Qwen/Qwen2.5-72B/blob/main/LICENSE",
            (
                "pass on a copy of the agreement",
                "say that the files were changed",
                'keep "Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights '
                'Reserved." in a text file named "Notice"',
                "ask Alibaba Cloud first above 100 million monthly users",
            ),
            standard=False,
        ),
        Licence(
            "qwen-research",
            "Qwen Research License Agreement",
            "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE",
            (
                "pass on a copy of the agreement and its notice",
                "say that the files were changed",
                "allow no commercial use",
            ),
            standard=False,
        ),
        Licence(
            "mrl",
            "Mistral AI Research License",
            "https://mistral.ai/licenses/MRL-0.1.md",
            ("pass on a copy of the licence", "say that the files were changed", "allow research use only"),
            standard=False,
        ),
        Licence(
            "mnpl",
            "Mistral AI Non-Production License",
            "https://mistral.ai/licenses/MNPL-0.1.md",
            ("pass on a copy of the licence", "say that the files were changed", "allow no use in production"),
            standard=False,
        ),
        Licence(
            "deepseek",
            "DeepSeek Model License",
            "https://github.com/deepseek-ai/DeepSeek-LLM/blob/main/LICENSE-MODEL",
            (
                "bind whoever gets it to the use restrictions (attachment A)",
                "pass on a copy of the licence",
                "say that the files were changed",
            ),
            standard=False,
        ),
        Licence(
            "openrail", "OpenRAIL", "https://www.licenses.ai", ("bind whoever gets it to the use restrictions", _COPY)
        ),
    )
}

FAMILIES = (
    ("Llama", r"llama-?2", "llama2"),
    ("Llama", r"llama-?3\.1", "llama3.1"),
    ("Llama", r"llama-?3\.2", "llama3.2"),
    ("Llama", r"llama-?3\.3", "llama3.3"),
    ("Llama", r"llama-?3", "llama3"),
    ("Llama", r"llama-?4", "llama4"),
    ("Gemma", r"gemma", "gemma"),
    ("Qwen", r"qwen", "apache-2.0, qwen or qwen-research, by size"),
    ("Mistral", r"mixtral|mistral|ministral|codestral|magistral", "apache-2.0, mrl or mnpl, by model"),
    ("Phi", r"\bphi-?\d", "mit"),
    ("DeepSeek", r"deepseek", "mit or deepseek, by model; a distilled one also its own base's"),
)
"""(family, what its names look like, the licences it comes under). A name proves nothing: this is a hint."""


def known_licence(name: str | None) -> Licence | None:
    """The licence of an identifier; None if it is not known."""
    return LICENCES.get(name.strip().lower()) if name else None


def hint(model: str) -> str:
    """What a model of that name usually comes under, as a sentence; empty for an unknown family."""
    for family, pattern, names in FAMILIES:
        if re.search(pattern, model, re.IGNORECASE):
            return f"{family} models come under {names}."
    return ""


def refusal(name: str | None, model: str) -> str | None:
    """Why a derivative of `model` under the licence `name` is not to be passed on; None if it may be."""
    if name is None:
        return f"the licence of {model} is not known. {hint(model)}".strip()
    known = known_licence(name)
    if known is None:
        return f"what the licence '{name}' of {model} asks is not known here. {hint(model)}".strip()
    if not known.redistribution:
        return f"{known.name}, the licence of {model}, forbids passing on derivatives ({known.link})"
    return None
