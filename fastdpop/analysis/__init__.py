"""What a model makes of preference pairs, token by token: the analysis of section 5.2 of Smaug
(arXiv:2402.13228), and a report that says why a chosen log-prob falls.
"""
