/**
 * The device-map editor without its elements: the placement that is asked for, what Python says of it, and
 * whether it is being carried out. Every change is a proposal; only `apply` moves bytes.
 */

import type {
  AppliedEvent, Command, Event, FailedEvent, MapState, Placement, PlanState, ProgressEvent, ProposalEvent,
} from '../wire'
import { guess, withTied } from './editor_guess'
import { History } from './editor_history'
import { Selection } from './editor_selection'
import { Talk } from './editor_talk'
import { isEditable } from './map_facts'

/** A placement that is asked for; `plan` is a guess until there is an answer. */
export interface Step {
  placement: Required<Placement>
  plan: PlanState
  answer: ProposalEvent | null
  failure: FailedEvent | null
  gesture: string
}

const AUTO = 'auto'

export class Editor {
  readonly selection = new Selection()
  progress: ProgressEvent | null = null
  applied: AppliedEvent | null = null
  /** Why the last Apply was not done. */
  failure: FailedEvent | null = null
  isApplying = false
  private isLost = false
  private applySeq = -1
  private history = new History<Step | null>(null)
  private readonly talk: Talk

  constructor(
    public state: MapState,
    private readonly view: string,
    private readonly send: (command: Command) => void,
    private readonly changed: () => void,
  ) {
    this.talk = new Talk(view, send)
  }

  // --- What is shown

  get step(): Step | null {
    return this.history.current
  }

  /** The plan that the map draws: what is asked for, else what is in force. */
  get plan(): PlanState {
    return this.step?.plan ?? this.state.plan
  }

  get isWaiting(): boolean {
    return this.talk.isWaiting
  }

  get canEdit(): boolean {
    return !this.isLost && !this.isApplying && isEditable(this.state)
  }

  get canUndo(): boolean {
    return this.canEdit && this.history.canUndo
  }

  get canRedo(): boolean {
    return this.canEdit && this.history.canRedo
  }

  get canApply(): boolean {
    if (!this.canEdit || this.isWaiting) return false
    const isPlanned = this.state.status === 'planned'
    if (!this.step) return isPlanned && this.plan.fits
    const { answer, failure } = this.step
    return !failure && answer !== null && answer.plan.fits && (isPlanned || answer.changed > 0)
  }

  /** Budgets that the user set, here or before; others are what is free. */
  get limits(): Record<string, number> {
    if (this.step) return this.step.placement.limits
    const limited = this.state.plan.tiers.filter(tier => tier.is_limited)
    return Object.fromEntries(limited.map(tier => [tier.device, tier.limit]))
  }

  /** The policy that is chosen; empty when blocks were placed by hand. */
  get policy(): string {
    if (this.step) return this.step.placement.policy
    return this.state.policies.includes(this.plan.policy) ? this.plan.policy : ''
  }

  /** The blocks that would go along with these, with themselves, when they move. */
  movers(labels: Iterable<string>): Set<string> {
    return withTied(this.plan, labels)
  }

  // --- What a person does

  /** Ask for these blocks on a device. Returns how many of them were elsewhere. */
  move(labels: Iterable<string>, device: string): number {
    const isTarget = this.plan.tiers.some(tier => tier.device === device && tier.can_hold)
    if (!this.canEdit || !isTarget) return 0
    const movers = this.movers(labels)
    const count = this.plan.blocks.filter(block => movers.has(block.label) && block.home !== device).length
    if (!count) return 0
    const plan = guess(this.plan, movers, device)
    this.ask({ homes: homesOf(plan), policy: '', limits: this.limits }, plan)
    return count
  }

  choosePolicy(policy: string): void {
    if (policy) this.ask({ homes: {}, policy, limits: this.limits })
  }

  /** A budget while its slider moves; `endGesture` when it rests. */
  setLimit(device: string, bytes: number): void {
    const limits = { ...this.limits, [device]: bytes }
    this.ask({ homes: {}, policy: this.policy || AUTO, limits }, this.plan, `limit ${device}`)
  }

  endGesture(): void {
    this.history.endGesture()
  }

  /** Leave it to the planner, with the budgets that are in force. */
  reset(): void {
    const limited = this.state.plan.tiers.filter(tier => tier.is_limited)
    const limits = Object.fromEntries(limited.map(tier => [tier.device, tier.limit]))
    this.ask({ homes: {}, policy: AUTO, limits })
  }

  /** Back to what is in force. */
  revert(): void {
    if (!this.canEdit || !this.step) return
    this.history.push(null)
    this.settle()
  }

  undo(): void {
    if (this.canUndo && this.history.undo()) this.settle()
  }

  redo(): void {
    if (this.canRedo && this.history.redo()) this.settle()
  }

  apply(): void {
    if (!this.canApply) return
    this.isApplying = true
    this.failure = this.applied = this.progress = null
    const placement = this.step?.placement ?? { homes: homesOf(this.plan), policy: '', limits: this.limits }
    this.applySeq = this.talk.apply(placement)
    this.changed()
  }

  stop(): void {
    if (!this.isLost) this.send({ type: 'stop', view: this.view })
  }

  // --- What Python says

  take(event: Event): void {
    if (this.isLost) return
    if (event.type === 'proposal') this.takeProposal(event)
    else if (event.type === 'failed') this.takeFailure(event)
    else if (event.type === 'progress') this.progress = event
    else if (event.type === 'applied' && event.seq === this.applySeq) this.takeApplied(event)
    else return
    this.changed()
  }

  /** Another state is in force: what was asked for is history. */
  update(state: MapState): void {
    this.state = state
    this.history = new History<Step | null>(null)
    this.talk.drop()
    this.isApplying = false
    this.progress = this.failure = this.applied = null
    this.selection.keep(isEditable(state) ? state.plan.blocks.map(block => block.label) : [])
    this.changed()
  }

  /** No commands any more. */
  lose(): void {
    this.isLost = true
    this.isApplying = false
    this.progress = null
    this.talk.drop()
    this.selection.clear()
    this.changed()
  }

  private ask(placement: Required<Placement>, plan = this.plan, gesture = ''): void {
    if (!this.canEdit) return
    this.failure = this.applied = null
    this.history.push({ placement, plan, answer: null, failure: null, gesture }, gesture)
    this.talk.propose(placement)
    this.changed()
  }

  /** Another step of the history is the current one: ask anew, for memory may be another by now. */
  private settle(): void {
    this.failure = this.applied = null
    if (this.step) this.talk.propose(this.step.placement)
    else this.talk.forget()
    this.changed()
  }

  private takeProposal(event: ProposalEvent): void {
    const found = this.talk.take(event.seq)
    const { step } = this
    if (found === 'stale' || !step) return
    // While a slider moves, an answer to where it was a moment ago is better than none.
    if (found === 'past' && !step.gesture) return
    this.history.amend({ ...step, plan: event.plan, answer: event, failure: null })
  }

  private takeFailure(event: FailedEvent): void {
    if (event.seq === this.applySeq) {
      this.isApplying = false
      this.progress = null
      this.failure = event
    } else if (this.talk.take(event.seq) === 'newest' && this.step) {
      this.history.amend({ ...this.step, answer: null, failure: event })
    }
  }

  private takeApplied(event: AppliedEvent): void {
    this.isApplying = false
    this.progress = null
    this.applied = event
  }
}

function homesOf(plan: PlanState): Record<string, string> {
  return Object.fromEntries(plan.blocks.map(block => [block.label, block.home]))
}
