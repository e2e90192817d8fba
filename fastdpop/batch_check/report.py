"""What a check of a batch has found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something in a batch that is wrong, or looks wrong.

    Attributes:
        code: a stable name, such as ``"labels-shifted"``; docs/check.md explains each.
        severity: ``"error"`` where it is certain, ``"warning"`` where it could be meant.
        message: what was found, with the numbers that show it.
        advice: what to do.
    """

    code: str
    severity: Severity
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity} {self.code}: {self.message}. {self.advice}."


def counted(number: int, noun: str) -> str:
    """A number of things, in words that agree."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def between(low: int, high: int) -> str:
    """A range of numbers, which may be one."""
    return str(low) if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class BatchReport:
    """What :func:`fastdpop.check_batch` has found; true as a condition where that is nothing.

    Attributes:
        findings: mistakes, the certain ones first.
        facts: what was looked at, in words, with what could not be checked.
        shown: the decoded tokens of a pair or two, in lines.
    """

    findings: tuple[Finding, ...] = ()
    facts: tuple[str, ...] = ()
    shown: tuple[str, ...] = field(default=(), repr=False)

    @staticmethod
    def of(
        findings: Iterable[Finding], facts: Iterable[str], shown: Iterable[str] = ()
    ) -> BatchReport:
        """Sorted by severity."""
        ordered = sorted(findings, key=lambda finding: finding.severity)
        return BatchReport(tuple(ordered), tuple(facts), tuple(shown))

    @property
    def ok(self) -> bool:
        """Whether nothing looks wrong: there is neither an error nor a warning."""
        return not self.findings

    @property
    def codes(self) -> tuple[str, ...]:
        """The findings' codes."""
        return tuple(finding.code for finding in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        """What is printed."""
        lines = [*self.shown, "", *self.facts, ""] if self.shown else [*self.facts, ""]
        for finding in self.findings:
            lines.append(f"{finding.severity.upper()} {finding.code}: {finding.message}.")
            lines.append(f"    {finding.advice}.")
        if self.ok:
            lines.append("Nothing looks wrong.")
        return "\n".join(lines)

    def raise_for_mistakes(self) -> None:
        """
        Raises:
            ValueError: there is a finding, error or warning; the message has them all.
        """
        if self.findings:
            raise ValueError("\n".join(map(str, self.findings)))
