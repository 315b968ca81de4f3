// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Kind says in which way an answer goes wrong.
type Kind string

// The kinds of fault.
const (
	// None answers as it should; with Delay or Hold it does so late.
	None Kind = ""
	// Refuse answers Status with ErrorType and Message, or with Body as it is
	// (as a proxy in between would).
	Refuse Kind = "refuse"
	// Body answers 200 with Body instead of the answer.
	Body Kind = "body"
	// Truncated answers 200 and ends the connection in the middle of the body.
	Truncated Kind = "truncated"
	// Reset cuts the connection instead of answering.
	Reset Kind = "reset"
	// Omit leaves Members out of the answer.
	Omit Kind = "omit"
	// Empty makes Members null.
	Empty Kind = "empty"
	// WrongType makes Members a list of one number.
	WrongType Kind = "wrong_type"
	// Expired answers credentials that have expired a minute ago.
	Expired Kind = "expired"
	// OtherSubject answers with somebody else's subject.
	OtherSubject Kind = "other_subject"
	// OtherAudience answers for another audience.
	OtherAudience Kind = "other_audience"
)

// Fault shapes the answers of the calls that take it.
type Fault struct {
	Kind Kind
	// Times is how many calls take it; 0 means all, until ClearFaults.
	Times int
	// Delay is waited before anything is answered.
	Delay time.Duration
	// Hold, if not nil, keeps the answer back until it is closed.
	Hold <-chan struct{}
	// Status, ErrorType, Message and RetryAfter are Refuse's. Status 0 takes
	// the status that the service's model gives ErrorType.
	Status     int
	ErrorType  string
	Message    string
	RetryAfter string
	// Body is Body's, or Refuse's.
	Body []byte
	// Members are Omit's, Empty's and WrongType's: paths such as
	// "credentials.sessionToken".
	Members []string
}

// modelled are the statuses of the service's errors.
func modelled() map[string]int {
	return map[string]int{
		"AccessDeniedException":       http.StatusBadRequest,
		"ExpiredTokenException":       http.StatusBadRequest,
		"InvalidTokenException":       http.StatusBadRequest,
		"InvalidParameterException":   http.StatusBadRequest,
		"InvalidRequestException":     http.StatusBadRequest,
		"ResourceNotFoundException":   http.StatusNotFound,
		"ThrottlingException":         http.StatusTooManyRequests,
		"InternalServerException":     http.StatusInternalServerError,
		"ServiceUnavailableException": http.StatusServiceUnavailable,
	}
}

// ErrorTypes are the errors in the service's model, sorted.
func ErrorTypes() []string { return slices.Sorted(maps.Keys(modelled())) }

// Inject adds a fault behind those there are: each call takes the first one
// that is not used up.
func (s *Server) Inject(f Fault) {
	if f.Kind == Refuse && f.Status == 0 {
		f.Status = modelled()[f.ErrorType]
		if f.Status == 0 {
			f.Status = http.StatusInternalServerError
		}
	}
	s.faults.Add(f, f.Times)
}

// ClearFaults makes the stand-in answer properly again.
func (s *Server) ClearFaults() { s.faults.Clear() }

// applyMember bends one member of the answer.
func applyMember(answer map[string]any, path string, kind Kind) {
	parent := answer
	outer, inner, nested := strings.Cut(path, ".")
	if nested {
		var ok bool
		if parent, ok = answer[outer].(map[string]any); !ok {
			return
		}
		outer = inner
	}
	switch kind {
	case Omit:
		delete(parent, outer)
	case Empty:
		parent[outer] = nil
	case WrongType:
		parent[outer] = []int{1}
	}
}
