"""``fastdpop train``: from files of preference pairs to a saved model, by TRL's ``DPOTrainer``.

What is read, tokenised and checked is in :mod:`fastdpop.data`, the loss in
:mod:`fastdpop.integrations.trl`. Here are the command's options (:mod:`.options`, :mod:`.parse`),
the trainer with its checkpoints (:mod:`.trainer`, :mod:`.checkpoint`), what a user sees
(:mod:`.report`, :mod:`.picture`) and the run itself (:mod:`.run`).
"""
