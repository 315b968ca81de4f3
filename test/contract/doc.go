// SPDX-License-Identifier: Apache-2.0

// Package contract holds black-box tests of the endpoint's contract with AWS
// clients: the defects of the EKS Pod Identity Agent 0.1.37 that Latchkey must
// not have, each a test named after it; what every real client shows a person
// when something is wrong; and what bad or greedy clients cannot do. README.md
// says which test shows what. The tests need root (build tag privileged).
package contract
