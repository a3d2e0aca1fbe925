"""The instrument check: can a suite tell a good encoder from a bad one at the size of a study?

``check`` trains and evaluates the controls and writes ``instrument.json``, ``limits`` judges the rows, ``gate`` is what
`study run` asks.
"""
