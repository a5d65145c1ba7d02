"""Building blocks of attention, experts, and dense layers: sparse site, gated activation, and feed-forward network."""
