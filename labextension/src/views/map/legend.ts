/** What colours, patterns, signs and marks of the map stand for: those that are there. */

import { h, replace } from '../../dom'
import type { Translate } from '../../i18n'
import type { PlanState } from '../../wire'
import { EXPERTS_MARK, MOVED_MARK, TIED_MARK } from './cells'
import { fillOfPart, partsOf, shownTiers, signOf } from './facts'
import { fillWords, purposeWords, signWords } from './words'

export interface Legend {
  element: HTMLElement
  show: (plan: PlanState, isEditable: boolean, isLive: boolean, isProposal: boolean) => void
}

export function makeLegend(t: Translate): Legend {
  const element = h('div', { class: 'legend muted small' })
  return {
    element,
    show(plan, isEditable, isLive, isProposal) {
      replace(
        element,
        ...fillWords(t, plan).map(([fill, words]) => entry(`fill-${fill}`, words)),
        ...purposes(t, plan, isEditable),
        ...(isLive ? times(t) : []),
        ...signWords(t, plan, signs(plan)).map(words => h('span', { class: 'entry' }, words)),
        isProposal && mark(MOVED_MARK, t('editMovedMark')),
        plan.blocks.some(block => block.tied_to.length) && mark(TIED_MARK, t('mapTiedMark')),
        plan.blocks.some(block => block.experts) && mark(EXPERTS_MARK, t('mapExpertsMark')),
      )
    },
  }
}

function purposes(t: Translate, plan: PlanState, isEditable: boolean): HTMLElement[] {
  const hasKept = plan.blocks.some(block => block.way === 'kept') // the blocks' entry says it already
  const parts = shownTiers(plan, isEditable).flatMap(partsOf).map(part => part.purpose)
  return [...new Set(parts)]
    .filter(purpose => purpose !== 'spare' && purpose !== 'beyond' && !(purpose === 'kept' && hasKept))
    .map(purpose => entry(`fill-${fillOfPart(purpose)}`, purposeWords(t, purpose)))
}

function times(t: Translate): HTMLElement[] {
  const kinds = { wait: t('mapWait'), copy: t('mapCopy'), compute: t('mapCompute') }
  return Object.entries(kinds).map(([kind, words]) => entry(`time-${kind}`, words))
}

function signs(plan: PlanState): Map<string, string> {
  return new Map(plan.blocks.map(block => [signOf(plan, block), block.home]))
}

function entry(fill: string, words: string): HTMLElement {
  return h('span', { class: 'entry' }, h('span', { class: `swatch ${fill}`, 'aria-hidden': 'true' }), words)
}

function mark(sign: string, words: string): HTMLElement {
  return h('span', { class: 'entry' }, `${sign} ${words}`)
}
