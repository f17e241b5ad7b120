"""What is wrong with a deployment, in one vocabulary: services find it, `kvatlas doctor` prints it.

`vocabulary` has the codes, `board` keeps what is wrong now, `hashing` and `engine` find it in what engines say and do,
`keeper` logs it. All but the last are pure.
"""

from kvatlas_common.findings.board import Board, Found
from kvatlas_common.findings.vocabulary import Code, Finding, Severity

__all__ = ["Board", "Code", "Finding", "Found", "Severity"]
