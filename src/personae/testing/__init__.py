"""Contracts for authors of methods and denoisers, to be called from their own tests."""

from personae.testing.check_continual import check_continual
from personae.testing.check_denoiser import check_denoiser
from personae.testing.check_method import check_method
from personae.testing.contract import ContractBroken
from personae.testing.tiny import tiny_job, tiny_population

__all__ = ["ContractBroken", "check_continual", "check_denoiser", "check_method", "tiny_job", "tiny_population"]
