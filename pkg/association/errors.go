// SPDX-License-Identifier: Apache-2.0

package association

import "errors"

// Kind is what a failure means to the caller.
type Kind int

// The kinds, and what they are in the EKS API.
const (
	// Internal: ServerException, 500. Something in the store is not as it should.
	Internal Kind = iota
	// InvalidParameter: InvalidParameterException, 400.
	InvalidParameter
	// InvalidRequest: InvalidRequestException, 400.
	InvalidRequest
	// ClusterNotFound: ResourceNotFoundException, 404.
	ClusterNotFound
	// NotFound: ResourceNotFoundException, 404. The cluster is there, the
	// association is not.
	NotFound
	// InUse: ResourceInUseException, 409.
	InUse
	// LimitExceeded: ResourceLimitExceededException, 400.
	LimitExceeded
	// BadTags: BadRequestException, 400, of the tag operations.
	BadTags
	// TagsNotFound: NotFoundException, 404, of the tag operations.
	TagsNotFound
	// Unavailable: ServiceUnavailableException, 503. The store cannot be asked, or
	// did not say in time whether a change was made: to be tried again, with the
	// same client token.
	Unavailable
)

// One per Kind, for errors.Is.
var (
	ErrInternal         = errors.New("internal error of the association store")
	ErrInvalidParameter = errors.New("invalid parameter")
	ErrInvalidRequest   = errors.New("invalid request")
	ErrClusterNotFound  = errors.New("cluster not found")
	ErrNotFound         = errors.New("association not found")
	ErrInUse            = errors.New("resource in use")
	ErrLimitExceeded    = errors.New("resource limit exceeded")
	ErrBadTags          = errors.New("bad request for tags")
	ErrTagsNotFound     = errors.New("resource to tag not found")
	ErrUnavailable      = errors.New("association store unavailable")
)

func (k Kind) sentinel() error {
	switch k {
	case InvalidParameter:
		return ErrInvalidParameter
	case InvalidRequest:
		return ErrInvalidRequest
	case ClusterNotFound:
		return ErrClusterNotFound
	case NotFound:
		return ErrNotFound
	case InUse:
		return ErrInUse
	case LimitExceeded:
		return ErrLimitExceeded
	case BadTags:
		return ErrBadTags
	case TagsNotFound:
		return ErrTagsNotFound
	case Unavailable:
		return ErrUnavailable
	}
	return ErrInternal
}

func (k Kind) String() string { return k.sentinel().Error() }

// Error is a failure of this package. Message is for the client: it names
// nothing that the client did not send or may not know.
type Error struct {
	Kind    Kind
	Message string
	// Cluster is the clusterName member of the answer; may be empty.
	Cluster string
	// ID is the association in the way, of InUse.
	ID string
	// Cause is for the log; may be nil.
	Cause error
}

func (e *Error) Error() string {
	if e.Cause != nil {
		return e.Message + ": " + e.Cause.Error()
	}
	return e.Message
}

func (e *Error) Unwrap() error { return e.Cause }

// Is makes errors.Is work with the sentinel of the Kind.
func (e *Error) Is(target error) bool { return target == e.Kind.sentinel() }
