"""What attention, experts, and dense layers share: sparse site, gated activation, and feed-forward network."""
