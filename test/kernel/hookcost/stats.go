// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"slices"
)

// quantile of x, between its neighbours; NaN if x is empty.
func quantile(x []float64, q float64) float64 {
	if len(x) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(x))
	at := q * float64(len(s)-1)
	i := int(at)
	if i+1 == len(s) {
		return s[i]
	}
	return s[i] + (at-float64(i))*(s[i+1]-s[i])
}

func median(x []float64) float64 { return quantile(x, 0.5) }

// differences pairs the rounds: what disturbs one round disturbs both sides.
func differences(a, b []float64) []float64 {
	out := make([]float64, min(len(a), len(b)))
	for i := range out {
		out[i] = a[i] - b[i]
	}
	return out
}

// confidence is the 95 % interval of the median, by order statistics: it needs
// no assumption about how the noise is distributed.
func confidence(x []float64) (low, high float64) {
	if len(x) == 0 {
		return math.NaN(), math.NaN()
	}
	s := slices.Sorted(slices.Values(x))
	n := float64(len(s))
	half := 1.96 * math.Sqrt(n) / 2
	i := max(0, int(math.Floor(n/2-half)))
	j := min(len(s)-1, int(math.Ceil(n/2+half)))
	return s[i], s[j]
}
