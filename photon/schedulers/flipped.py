"""The least salient tokens: a control by which a scheduler's ranking must do better."""

from photon.schedulers.budget import BudgetScheduler


class FlippedScheduler(BudgetScheduler):
    """Keeps the tokens that the reference scheduler finds least salient, as many as it keeps."""

    name = "flipped"

    def score(self, inputs):
        return -self.reference(inputs).saliency
