"""What answers alone teach a scheduler to keep: trainings, measures, tables (`python -m photon.evidence`)."""
