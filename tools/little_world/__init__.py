"""A little world that is drawn by rule: scenes, their captions, and the models that paint them.

Everything follows from a seed, and nothing in it comes from elsewhere. A `Scene` says what there
is to see, `painting` draws it, `captions` tells of it in English and Chinese, and `read_back` finds
what a picture shows from its pixels alone.
"""
