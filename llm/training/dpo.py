"""Direct preference optimization: of two answers, make the chosen likelier than the rejected.

Source: Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290.
"""

from llm.artifact import ArtifactWriter, Json
from llm.config import AlignConfig
from llm.runtime.job import Job


def dpo(job: Job, writer: ArtifactWriter, config: AlignConfig) -> dict[str, Json]:
    """Train on preference pairs from the starting model's weights."""
    raise NotImplementedError
